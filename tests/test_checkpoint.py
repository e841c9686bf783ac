"""Loading checkpoints: whole or not at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import swinv2_mm
from swinv2_mm import CheckpointError, SwinTransformerV2, load_pretrained
from swinv2_mm.checkpoints import loading as checkpoint

SMALL = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


def official_file(backbone, path, pretrained_windows, windows):
    """What the official repository saves: our names, tables and masks, a classifier and the norm before it."""
    state_dict = {
        name: value
        for name, value in backbone.state_dict().items()
        if not name.startswith('norm') and name != 'pretrained_windows'
    }
    for i, (pretrained, window) in enumerate(zip(pretrained_windows, windows)):
        for j in range(2):
            prefix = f'layers.{i}.blocks.{j}'
            table = torch.zeros(1, 2 * window - 1, 2 * window - 1, 2)
            for row in range(2 * window - 1):
                for column in range(2 * window - 1):
                    for axis, offset in enumerate((row - window + 1, column - window + 1)):
                        scaled = 8 * offset / (pretrained - 1)
                        table[0, row, column, axis] = np.sign(scaled) * np.log2(abs(scaled) + 1) / np.log2(8)
            state_dict[f'{prefix}.attn.relative_coords_table'] = table
            state_dict[f'{prefix}.attn.relative_position_index'] = torch.zeros(window**2, window**2)
            state_dict[f'{prefix}.attn_mask'] = torch.zeros(4, window**2, window**2)
    channels = backbone.norm3.weight.numel()
    state_dict.update({'norm.weight': torch.rand(channels), 'norm.bias': torch.rand(channels)})
    state_dict.update({'head.weight': torch.rand(10, channels), 'head.bias': torch.rand(10)})
    torch.save({'model': state_dict, 'epoch': 300}, path)
    return path


def assert_same_stages(loaded, source):
    for name, value in source.state_dict().items():
        if name.startswith(('patch_embed', 'layers')):
            assert torch.equal(loaded.state_dict()[name], value), name


def test_an_official_file_loads_whole_and_says_its_windows(build_small, tmp_path):
    source = build_small()
    file = official_file(source, tmp_path / 'official.pth', (6, 6, 6, 3), (8, 8, 8, 4))
    backbone = SwinTransformerV2(
        SMALL,
        window_size=5,
        init_cfg=dict(type='Pretrained', checkpoint=str(file)),
    )
    backbone.init_weights()
    assert_same_stages(backbone, source)
    assert backbone.pretrained_window_sizes == (6, 6, 6, 3)
    assert backbone.window_size == (5, 5, 5, 5)
    for i in range(3):  # the file cannot have them
        assert torch.equal(getattr(backbone, f'norm{i}').weight, torch.ones(16 * 2**i))
    for name in ('weight', 'bias'):  # before the classifier
        assert torch.equal(getattr(backbone.norm3, name), torch.load(file)['model'][f'norm.{name}'])


def test_the_backbone_of_a_detector_loads_with_its_windows_and_norms(build_small, tmp_path):
    source = build_small(pretrained_window_sizes=(12, 12, 12, 6))
    state_dict = {f'backbone.{name}': value for name, value in source.state_dict().items()}
    state_dict['neck.weight'] = torch.rand(3)
    torch.save({'state_dict': state_dict, 'meta': {}}, tmp_path / 'detector.pth')
    backbone = build_small()
    load_pretrained(backbone, tmp_path / 'detector.pth')
    for name, value in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert backbone.pretrained_window_sizes == (12, 12, 12, 6)


@pytest.mark.parametrize('change', ['lacks', 'unknown', 'shape', 'deeper'])
def test_a_file_that_does_not_fit_loads_nothing(build_small, tmp_path, change):
    state_dict = build_small().state_dict()
    if change == 'lacks':
        del state_dict['layers.2.blocks.1.attn.proj.weight']
        message = r'it lacks layers\.2\.blocks\.1\.attn\.proj\.weight: it is damaged'
    elif change == 'unknown':
        state_dict['layers.0.blocks.1.attn.k_bias'] = torch.rand(16)
        message = r'it has layers\.0\.blocks\.1\.attn\.k_bias, which the backbone does not know'
    elif change == 'shape':
        state_dict['layers.2.blocks.1.mlp.fc1.weight'] = torch.rand(4, 5)
        message = r'it has layers\.2\.blocks\.1\.mlp\.fc1\.weight of shape \(4, 5\), not \(256, 64\)'
    else:
        state_dict['layers.0.blocks.2.norm1.weight'] = torch.rand(16)
        message = r'it has arch=.*\(3, 2, 2, 2\).* and the backbone arch=.*\(2, 2, 2, 2\).*: pass arch=.*\(3, 2, 2, 2\)'
    torch.save(state_dict, tmp_path / 'wrong.pth')
    backbone = build_small()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(backbone, tmp_path / 'wrong.pth')
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_report_counts_every_tensor_of_the_file_and_shows_the_windows(build_small, tmp_path):
    source = build_small()
    file = official_file(source, tmp_path / 'official.pth', (6, 6, 6, 3), (8, 8, 8, 4))
    backbone = SwinTransformerV2(SMALL, window_size=5)
    report = load_pretrained(backbone, file)
    held = set(torch.load(file)['model'])
    assert {name.replace('norm3', 'norm') if name.startswith('norm3') else name for name in report.loaded} | set(
        report.left_out
    ) == held
    assert report.left_out['head.weight'] == 'classifier'
    assert report.left_out['layers.1.blocks.1.attn_mask'] == 'computed anew'
    assert set(report.loaded) | set(report.initial) == set(backbone.state_dict()) - {'pretrained_windows'}
    assert report.converted == {}
    assert (report.checkpoint_window_size, report.window_size) == ((8, 8, 8, 4), (5, 5, 5, 5))
    assert (report.checkpoint_pretrained_window_sizes, report.pretrained_window_sizes) == ((6, 6, 6, 3),) * 2
    lines = [' '.join(line.split()) for line in str(report).splitlines()]
    assert lines[0] == f'Loaded {file} (format: official, found at model)'
    assert lines[2] == 'window 8 -> 5 8 -> 5 8 -> 5 4 -> 5'
    assert lines[3] == 'pretrained window 6 -> 6 6 -> 6 6 -> 6 3 -> 3 relative_coords_table in the file'
    assert lines[4] == f'loaded {len(report.loaded)} tensors'
    assert '24 computed anew' in str(report) and '2 classifier (head.weight, ...)' in str(report)


def test_the_report_is_logged(build_small, monkeypatch):
    logged = []
    monkeypatch.setattr(checkpoint, 'print_log', lambda message, **kwargs: logged.append(message))
    report = load_pretrained(build_small(), build_small().state_dict())
    assert logged == [str(report)]
    assert str(report).startswith('Loaded state dict (format: swinv2_mm)')


def test_what_may_be_missing_is_allowed_by_name(build_small, tmp_path):
    source, backbone = build_small(), build_small(in_channels=4)
    torch.save(source.state_dict(), tmp_path / 'rgb.pth')
    initial = backbone.patch_embed.proj.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"in_channels=3 .* in_channels=4: .* or allow_missing=\['patch_embed.pro"
    ):
        load_pretrained(backbone, tmp_path / 'rgb.pth')
    backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'rgb.pth'), allow_missing='patch_embed.proj.weight'
    )
    backbone.init_weights()
    filters = backbone.patch_embed.proj.weight
    assert torch.equal(filters[:, :3], source.patch_embed.proj.weight) and torch.equal(filters[:, 3:], initial[:, 3:])
    for name, value in source.state_dict().items():
        if name != 'patch_embed.proj.weight':
            assert torch.equal(backbone.state_dict()[name], value), name
    report = load_pretrained(backbone, tmp_path / 'rgb.pth', allow_missing=['patch_embed'])
    assert report.converted == {'patch_embed.proj.weight': 'filters of the first 3 channels kept, 1 initial'}
    assert report.initial == report.left_out == {}


def test_filters_of_another_patch_size_are_left_out(build_small):
    backbone = build_small(patch_size=2)
    initial = backbone.patch_embed.proj.weight.clone()
    report = load_pretrained(backbone, build_small().state_dict(), allow_missing=['patch_embed.proj.weight'])
    assert torch.equal(backbone.patch_embed.proj.weight, initial)
    assert report.initial == {'patch_embed.proj.weight': 'allowed by allow_missing'}
    assert report.left_out == {'patch_embed.proj.weight': 'of another shape, which allow_missing allows'}


def test_a_grey_image_has_the_features_of_the_same_image_in_rgb(build_small):
    source, backbone = build_small().double().eval(), build_small(in_channels=1).double().eval()
    report = load_pretrained(backbone, source.state_dict(), allow_missing=['patch_embed.proj.weight'])
    assert report.converted == {'patch_embed.proj.weight': 'filters of 3 channels summed'}
    image = torch.randn(1, 1, 40, 56, dtype=torch.float64)
    for grey, rgb in zip(backbone(image), source(image.expand(1, 3, 40, 56))):
        torch.testing.assert_close(grey, rgb, rtol=1e-12, atol=1e-12)


def test_one_of_several_backbones_is_chosen_by_its_prefix(build_small):
    teacher, student = build_small(), build_small()
    student.patch_embed.norm.bias.data += 1
    both = {'teacher': teacher, 'student': student}
    flat = {f'{who}.backbone.{name}': value for who, net in both.items() for name, value in net.state_dict().items()}
    nested = {who: {f'backbone.{name}': value for name, value in net.state_dict().items()} for who, net in both.items()}
    for file in ({'state_dict': flat}, {'state_dict': nested}, nested):
        with pytest.raises(CheckpointError, match=r"several backbones.*'student.*choose one, as prefix='student"):
            load_pretrained(build_small(), file)
        for who, net in both.items():
            for prefix in (who, f'{who}.', f'{who}.backbone', f'{who}.backbone.'):
                backbone = build_small()
                load_pretrained(backbone, file, prefix=prefix)
                assert torch.equal(backbone.patch_embed.norm.bias, net.patch_embed.norm.bias)
    with pytest.raises(CheckpointError, match=r"no Swin V2 with the prefix 'ema', but with 'teacher.backbone.', '"):
        load_pretrained(build_small(), {'state_dict': flat}, prefix='ema')


@pytest.mark.parametrize(
    'extra', [dict(prefix='backbone.'), dict(prefix='backbone'), dict(map_location='cpu')], ids=str
)
def test_init_cfg_takes_what_mmengine_takes_there(build_small, tmp_path, extra):
    source = build_small()
    weights = {f'backbone.{name}': value for name, value in source.state_dict().items()}
    torch.save({'state_dict': weights}, tmp_path / 'a.pth')
    backbone = build_small(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), **extra))
    backbone.init_weights()
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in source.state_dict().items())


def test_of_a_file_without_a_part_only_that_part_must_be_allowed(build_small):
    source, backbone = build_small(), build_small()
    state_dict = {name: value for name, value in source.state_dict().items() if not name.startswith('patch_embed.norm')}
    initial = backbone.patch_embed.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r'it lacks patch_embed\.norm\.weight:'):
        load_pretrained(backbone, state_dict, allow_missing=['patch_embed.norm.bias', 'patch_embed.proj'])
    report = load_pretrained(backbone, state_dict, allow_missing=['patch_embed.norm'])
    assert set(report.initial) == {'patch_embed.norm.weight', 'patch_embed.norm.bias'}
    assert torch.equal(backbone.patch_embed.norm.weight, initial)
    with pytest.raises(CheckpointError, match=r"allow_missing names 'patch_embed\.nrom', and the backbone has no such"):
        load_pretrained(backbone, state_dict, allow_missing=['patch_embed.nrom'])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_loaded_in_that_of_the_backbone(build_small, dtype):
    source, backbone = build_small(), build_small()
    state_dict = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in source.state_dict().items()
    }
    load_pretrained(backbone, state_dict)
    for name, value in state_dict.items():
        loaded = backbone.state_dict()[name]
        assert loaded.dtype in (torch.float32, torch.int64)
        assert torch.equal(loaded, value.to(loaded.dtype)), name


def test_a_whole_detector_is_not_loaded_into(build_small):
    with pytest.raises(TypeError, match=r'got Sequential: pass model\.backbone'):
        load_pretrained(torch.nn.Sequential(build_small()), build_small().state_dict())


def test_the_package_of_checkpoints_is_imported_without_the_backbone():
    code = """
import importlib, pkgutil, sys, types
package = types.ModuleType('swinv2_mm')  # without its __init__, which imports all
package.__path__ = [sys.argv[1]]
sys.modules.update({'swinv2_mm': package, 'swinv2_mm.backbone': None, 'swinv2_mm.blocks': None})
checkpoints = importlib.import_module('swinv2_mm.checkpoints')
found = [one.name for one in pkgutil.walk_packages(checkpoints.__path__, 'swinv2_mm.checkpoints.')]
for name in found:
    importlib.import_module(name)
print(*found)
"""
    folder = Path(swinv2_mm.__file__).parent
    found = subprocess.run([sys.executable, '-c', code, folder], check=True, capture_output=True, text=True).stdout
    assert {'swinv2_mm.checkpoints.loading', 'swinv2_mm.checkpoints.formats.timm'} <= set(found.split())
