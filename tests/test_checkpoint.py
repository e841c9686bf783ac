"""Reading and loading checkpoints: safe, whole or not at all."""

import os

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from swinv2_mm import CheckpointError, SwinTransformerV2, load_pretrained
from swinv2_mm.checkpoint import pretrained_windows_from_tables, read_checkpoint
from swinv2_mm.position_bias import log_spaced_coordinates


class Malicious:
    """Writes a file when it is unpickled freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


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
    state_dict |= {'norm.weight': torch.rand(channels), 'norm.bias': torch.rand(channels)}
    state_dict |= {'head.weight': torch.rand(10, channels), 'head.bias': torch.rand(10)}
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
        arch=dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
        window_size=5,
        init_cfg=dict(type='Pretrained', checkpoint=str(file)),
    )
    backbone.init_weights()
    assert_same_stages(backbone, source)
    assert backbone.pretrained_window_sizes == (6, 6, 6, 3)
    assert backbone.window_size == (5, 5, 5, 5)
    for i in range(4):  # the file cannot have them
        assert torch.equal(getattr(backbone, f'norm{i}').weight, torch.ones(16 * 2**i))


def test_the_argument_wins_over_the_windows_of_the_file(build_small, tmp_path):
    source = build_small()
    file = official_file(source, tmp_path / 'official.pth', (6, 6, 6, 3), (8, 8, 8, 4))
    backbone = build_small(pretrained_window_sizes=(7, 7, 7, 4))
    load_pretrained(backbone, file)
    assert_same_stages(backbone, source)
    assert backbone.pretrained_window_sizes == (7, 7, 7, 4)


@pytest.mark.parametrize('pretrained', [2, 4, 8, 12, 16, 24])
@pytest.mark.parametrize('window', [1, 2, 8, 16, 24, 48])
def test_windows_are_inferred_from_the_tables(pretrained, window):
    table = log_spaced_coordinates(window, window, pretrained)[None]
    expected = pretrained if window > 1 else 1
    assert pretrained_windows_from_tables({'layers.0.blocks.0.attn.relative_coords_table': table}) == (expected,)


def test_a_file_that_does_not_say_its_windows_needs_the_argument(build_small, tmp_path):
    source = build_small()
    state_dict = {name: value for name, value in source.state_dict().items() if name != 'pretrained_windows'}
    torch.save(state_dict, tmp_path / 'bare.pth')
    with pytest.raises(CheckpointError, match='pass pretrained_window_sizes'):
        load_pretrained(build_small(), tmp_path / 'bare.pth')
    backbone = build_small(pretrained_window_sizes=4)
    load_pretrained(backbone, tmp_path / 'bare.pth')
    assert_same_stages(backbone, source)


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


@pytest.mark.parametrize('change', ['lacks', 'unknown', 'shape'])
def test_a_file_that_does_not_fit_loads_nothing(build_small, tmp_path, change):
    state_dict = build_small().state_dict()
    if change == 'lacks':
        del state_dict['layers.2.blocks.1.attn.proj.weight']
        message = r'it lacks layers\.2\.blocks\.1\.attn\.proj\.weight;'
    elif change == 'unknown':
        state_dict['layers.0.blocks.2.attn.proj.weight'] = torch.rand(3)
        message = r'does not know layers\.0\.blocks\.2\.attn\.proj\.weight:'
    else:
        state_dict['layers.3.blocks.0.mlp.fc1.weight'] = torch.rand(4, 5)
        message = r'fc1\.weight is \(4, 5\) in the file and \(512, 128\) in the backbone'
    torch.save(state_dict, tmp_path / 'wrong.pth')
    backbone = build_small()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(backbone, tmp_path / 'wrong.pth')
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_mmengine_writes_is_read_back(tmp_path):
    hub = MessageHub('test')
    hub.update_scalar('train/loss', 2.5)
    hub.update_scalar('val/AP', np.float64(0.25))
    hub.update_info('iter', 7)
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub.state_dict()}, tmp_path / 'run.pth')
    scalars = read_checkpoint(tmp_path / 'run.pth')['message_hub']['log_scalars']
    assert scalars['train/loss'].current() == 2.5
    assert scalars['val/AP'].statistics('mean') == 0.25


@pytest.mark.parametrize('wrapper', ['state_dict', 'model', 'meta', 'message_hub'])
def test_a_file_that_could_run_code_is_refused_by_name(tmp_path, wrapper):
    ran = tmp_path / 'ran'
    torch.save({wrapper: {'w': Malicious(ran)}}, tmp_path / 'malicious.pth')
    with pytest.raises(CheckpointError, match=r'holds \w+\.system, which could run code') as error:
        read_checkpoint(tmp_path / 'malicious.pth')
    assert '\n' not in str(error.value)
    assert not ran.exists()


class Getattr:
    """Asks for an attribute of a class, as a pickle of mmengine does for its log history."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


@pytest.mark.parametrize(('owner', 'name'), [(np.ndarray, 'tofile'), (dict, 'get'), (np.ndarray, 'min')])
def test_getattr_is_allowed_for_the_log_history_alone(tmp_path, owner, name):
    torch.save({'x': Getattr(owner, name)}, tmp_path / 'getattr.pth')
    with pytest.raises(CheckpointError, match='refused'):
        read_checkpoint(tmp_path / 'getattr.pth')


@pytest.mark.parametrize('content', ['missing', 'folder', 'empty', 'text', 'truncated', 'list'])
def test_what_is_no_checkpoint_is_one_clear_line(tmp_path, content):
    path = tmp_path / 'x.pth'
    if content == 'folder':
        path.mkdir()
    elif content == 'empty':
        path.touch()
    elif content == 'text':
        path.write_text('weights\n')
    elif content == 'truncated':
        torch.save({'w': torch.rand(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content == 'list':
        torch.save([torch.ones(1)], path)
    with pytest.raises(CheckpointError, match=str(path)) as error:
        read_checkpoint(path)
    assert '\n' not in str(error.value)


def test_without_network_the_error_says_how_to_get_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    url = 'http://127.0.0.1:9/swinv2.pth'  # nothing listens on the discard port
    with pytest.raises(CheckpointError, match=rf'cannot download {url}.*wget {url}.*--checkpoint FILE'):
        read_checkpoint(url)
    assert not list(tmp_path.glob('checkpoints/*'))


def test_a_downloaded_file_is_not_downloaded_again(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    torch.save({'w': torch.full((2,), 3.0)}, tmp_path / 'checkpoints' / 'swinv2.pth')
    assert read_checkpoint('http://127.0.0.1:9/swinv2.pth')['w'].tolist() == [3, 3]
