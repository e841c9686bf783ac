"""The backbone as a function of its image and arguments."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from torch import nn

from swinv2_mm import CheckpointError, SwinTransformerV2, load_pretrained
from swinv2_mm.blocks import PatchEmbed, PatchMerging
from swinv2_mm.position_bias import log_spaced_coordinates
from swinv2_mm.windows import gather, partition, scatter

ARCHS = ['tiny', 'small', 'base', 'large', 'huge', 'giant']


def assert_same_maps(actual, expected, **tolerance):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, **tolerance)


def build_without_memory(arch, **kwargs):
    with torch.device('meta'):
        return SwinTransformerV2(arch, **kwargs)


@pytest.mark.parametrize('arch, count', [('tiny', 27_578_154), ('small', 48_959_418), ('base', 86_893_816)])
def test_parameter_counts_are_the_published_ones(arch, count):
    assert sum(p.numel() for p in build_without_memory(arch, out_indices=(3,)).parameters()) == count


@pytest.mark.parametrize('arch', ARCHS)
def test_heads_have_32_channels(arch):
    for stage in build_without_memory(arch).layers:
        for block in stage.blocks:
            assert block.attn.qkv.weight.shape[1] == 32 * block.attn.logit_scale.numel()


@pytest.mark.parametrize('arch', ARCHS)
def test_huge_and_giant_have_a_norm_after_every_sixth_block(arch):
    names = {name for name, _ in build_without_memory(arch).named_parameters() if 'blocks' in name and 'norm3' in name}
    ends = {'huge': (5, 11, 17), 'giant': (5, 11, 17, 23, 29, 35, 41)}.get(arch, ())
    assert names == {f'layers.2.blocks.{j}.norm3.{name}' for j in ends for name in ('weight', 'bias')}


def layer_norm(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)


def test_pyramid_is_blocks_extra_norms_merging_and_output_norms(build_small):
    arch = {'embed_dims': 8, 'depths': (4, 3), 'num_heads': (1, 2), 'extra_norm_every_n_blocks': 2}
    backbone = build_small(arch=arch, window_size=(4, 5), out_indices=(0, 1)).double().eval()
    image = torch.randn(2, 3, 50, 39, dtype=torch.float64)
    expected, x = [], backbone.patch_embed(image)
    for i, (window, stage) in enumerate(zip((4, 5), backbone.layers)):
        for j, block in enumerate(stage.blocks):
            windows = partition(*x.shape[:3], window, (window // 2) * (j % 2))
            table = block.attn.position_bias(window, window)
            attended = block.attn(gather(x, [windows])[0], windows, table)
            x = x + layer_norm(scatter([attended], [windows], *x.shape[:3]), block.norm1)
            x = x + layer_norm(block.mlp(x), block.norm2)
            if j in (1, 3):
                x = layer_norm(x, block.norm3)
        expected.append(layer_norm(x, getattr(backbone, f'norm{i}')).permute(0, 3, 1, 2))
        x = stage.downsample(x)
    assert_same_maps(backbone(image), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize('size', [(1, 1), (1, 37), (33, 5), (63, 129), (224, 224), (800, 1333)])
def test_maps_are_contiguous_and_of_ceil_sizes(build_small, size):
    maps = build_small(window_size=16).eval()(torch.randn(1, 3, *size))
    for i, x in enumerate(maps):
        stride = 4 * 2**i
        assert x.shape == (1, 16 * 2**i, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert x.is_contiguous()
        assert x.isfinite().all()


@pytest.mark.parametrize('size', [(8, 8), (5, 7), (1, 9), (6, 3), (1, 1)])
def test_patch_merging_concatenates_neighbours_column_by_column_and_zeros_outside(randomize, size):
    merging = randomize(PatchMerging(3)).double()
    x = torch.randn(2, *size, 3, dtype=torch.float64)

    def token(row, column):
        return x[:, row, column] if row < size[0] and column < size[1] else torch.zeros(2, 3, dtype=torch.float64)

    out = merging(x)
    assert out.shape == (2, math.ceil(size[0] / 2), math.ceil(size[1] / 2), 6)
    for i, j in np.ndindex(out.shape[1:3]):
        row, column = 2 * i, 2 * j
        neighbours = [token(row, column), token(row + 1, column), token(row, column + 1), token(row + 1, column + 1)]
        expected = layer_norm(torch.cat(neighbours, 1) @ merging.reduction.weight.T, merging.norm)
        torch.testing.assert_close(out[:, i, j], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [(8, 8), (13, 7), (1, 1), (4, 9)])
def test_patch_embedding_pads_zeros_at_the_right_and_the_bottom(randomize, size):
    embed = randomize(PatchEmbed(3, 8, 4)).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    out = embed(image)
    assert out.shape == (2, math.ceil(size[0] / 4), math.ceil(size[1] / 4), 8)
    for i, j in np.ndindex(out.shape[1:3]):
        pixels = image[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        weight = embed.proj.weight[:, :, : pixels.shape[2], : pixels.shape[3]]
        expected = layer_norm(torch.einsum('bchw,ochw->bo', pixels, weight) + embed.proj.bias, embed.norm)
        torch.testing.assert_close(out[:, i, j], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('training', [False, True])
def test_images_of_a_batch_do_not_influence_each_other(build_small, training):
    backbone = build_small().double().train(training)
    images = torch.randn(3, 3, 70, 45, dtype=torch.float64)
    maps = backbone(images)
    for i in range(3):
        assert_same_maps(backbone(images[i : i + 1]), [x[i : i + 1] for x in maps], rtol=0, atol=1e-11)
    assert (maps[0][0] - maps[0][1]).abs().max() > 0.1


@pytest.mark.parametrize('out_indices', [(0,), (3,), (1, 2), (0, 3), (0, 1, 2)])
def test_a_subset_of_stages_gives_the_maps_of_the_full_pyramid(build_small, out_indices):
    backbone = build_small().eval()
    part = build_small(out_indices=out_indices).eval()
    state_dict = backbone.state_dict()
    part.load_state_dict({name: state_dict[name] for name in part.state_dict()})
    assert {name for name, _ in part.named_children() if name.startswith('norm')} == {f'norm{i}' for i in out_indices}
    image = torch.randn(1, 3, 70, 45)
    maps = backbone(image)
    assert_same_maps(part(image), [maps[i] for i in out_indices], rtol=0, atol=0)


@pytest.mark.parametrize('window_size, per_stage', [(7, (7, 7, 7, 7)), ([3, 8, 4, 1], (3, 8, 4, 1))])
def test_set_window_size_equals_a_backbone_built_with_that_window(build_small, window_size, per_stage):
    pretrained = (6, 6, 6, 3)
    backbone = build_small(window_size=4, pretrained_window_sizes=pretrained).eval()
    state_dict = {name: value.clone() for name, value in backbone.state_dict().items()}
    image = torch.randn(1, 3, 150, 90)
    with torch.no_grad():
        before = backbone(image)
        backbone.set_window_size(window_size)
        after = backbone(image)
        fresh = build_small(window_size=window_size, pretrained_window_sizes=pretrained).eval()
        fresh.load_state_dict(state_dict)
        assert_same_maps(after, fresh(image), rtol=0, atol=0)
    assert backbone.window_size == per_stage
    assert backbone.pretrained_window_sizes == pretrained
    assert_same_maps(list(backbone.state_dict().values()), list(state_dict.values()), rtol=0, atol=0)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(after, before))


PRETRAINED = (12, 12, 12, 6)


@pytest.fixture
def saved(build_small):
    """A state dict of a backbone with pretrained windows (12, 12, 12, 6), and what it makes of an image at window 5."""
    backbone = build_small(window_size=5, pretrained_window_sizes=PRETRAINED).eval()
    image = torch.randn(1, 3, 100, 75)
    with torch.no_grad():
        return backbone.state_dict(), image, backbone(image)


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()  # hands its records to no parent
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_pretrained_windows_are_adopted_from_a_state_dict(build_small, saved, log, prefix):
    state_dict, image, expected = saved
    backbone = build_small(window_size=5).eval()
    assert backbone.pretrained_window_sizes == (5, 5, 5, 5)
    with torch.no_grad():
        backbone(image)
        detector = nn.ModuleDict({'backbone': backbone}) if prefix else backbone
        detector.load_state_dict({prefix + name: value for name, value in state_dict.items()})
        assert_same_maps(backbone(image), expected, rtol=0, atol=0)
    assert backbone.pretrained_window_sizes == PRETRAINED
    assert backbone.state_dict()['pretrained_windows'].tolist() == [*PRETRAINED]
    assert not log.records


def test_pretrained_windows_given_as_argument_win_over_a_state_dict_with_a_warning(build_small, saved, log):
    state_dict, image, _ = saved
    backbone = build_small(window_size=5, pretrained_window_sizes=8).eval()
    backbone.load_state_dict(state_dict)
    assert backbone.pretrained_window_sizes == (8, 8, 8, 8)
    assert backbone.state_dict()['pretrained_windows'].tolist() == [8, 8, 8, 8]
    (record,) = log.records
    assert record.levelno == logging.WARNING
    assert '(12, 12, 12, 6)' in record.getMessage() and '(8, 8, 8, 8)' in record.getMessage()
    fresh = build_small(window_size=5, pretrained_window_sizes=8).eval()
    fresh.load_state_dict({**state_dict, 'pretrained_windows': torch.tensor([8, 8, 8, 8])})
    with torch.no_grad():
        assert_same_maps(backbone(image), fresh(image), rtol=0, atol=0)


@pytest.mark.parametrize('argument', [None, PRETRAINED])
def test_a_state_dict_without_pretrained_windows_loads_strictly_and_changes_none(build_small, saved, argument):
    state_dict, image, expected = saved
    del state_dict['pretrained_windows']
    backbone = build_small(window_size=5, pretrained_window_sizes=argument).eval()
    backbone.load_state_dict(state_dict, strict=True)
    assert 'pretrained_windows' not in state_dict
    assert backbone.pretrained_window_sizes == (argument or (5, 5, 5, 5))
    with torch.no_grad():
        same = [torch.equal(a, e) for a, e in zip(backbone(image), expected)]
    assert same == [argument is not None] * 4


def test_a_backbone_materialised_from_the_meta_device_saves_its_pretrained_windows(build_small):
    with torch.device('meta'):
        backbone = build_small(window_size=5)
    backbone.to_empty(device='cpu')
    backbone.pretrained_windows.fill_(77)  # what memory happens to hold
    backbone.load_state_dict(build_small(window_size=5).state_dict())
    assert backbone.state_dict()['pretrained_windows'].tolist() == [5, 5, 5, 5]


KINDS = {
    # the position biases, and the names of their parameters in an attention module
    'log_cpb': {'cpb_mlp.0.weight', 'cpb_mlp.0.bias', 'cpb_mlp.2.weight'},
    'linear_cpb': {'linear_cpb_mlp.0.weight', 'linear_cpb_mlp.0.bias', 'linear_cpb_mlp.2.weight'},
    'parameterized': {'relative_position_bias_table.weight'},
}


@pytest.mark.parametrize('position_bias', KINDS)
def test_each_position_bias_has_parameters_of_its_own_name(build_small, position_bias):
    names = set(build_small(position_bias=position_bias).state_dict())
    attention = 'layers.0.blocks.0.attn.'
    others = {f'{attention}{name}' for name in ('logit_scale', 'q_bias', 'v_bias')}
    others |= {f'{attention}{name}' for name in ('qkv.weight', 'proj.weight', 'proj.bias')}
    assert {name for name in names if name.startswith(attention)} - others == {
        f'{attention}{name}' for name in KINDS[position_bias]
    }


def table_of_values(mlp, window, spacing):
    """16 * sigmoid of a position MLP at each offset of a window, in rows of the vertical offset: ((2W-1)^2, heads)."""
    offsets = [(i, j) for i in range(1 - window, window) for j in range(1 - window, window)]
    coordinates = [[spacing(offset / (window - 1)) for offset in pair] for pair in offsets]
    first, _, last = mlp
    return 16 / (1 + torch.exp(-last(torch.relu(first(torch.tensor(coordinates, dtype=torch.float64))))))


@pytest.mark.parametrize(
    'position_bias, spacing',
    [
        ('log_cpb', lambda x: math.copysign(math.log2(1 + 8 * abs(x)) / 3, x)),
        ('linear_cpb', lambda x: x),
    ],
)
def test_a_table_of_the_values_of_a_position_mlp_gives_its_maps(build_small, position_bias, spacing):
    mlps = build_small(position_bias=position_bias, window_size=5).double().eval()
    tables = build_small(position_bias='parameterized', window_size=5).double().eval()
    state_dict = mlps.state_dict()
    for i, stage in enumerate(mlps.layers):
        for j, block in enumerate(stage.blocks):
            attention = f'layers.{i}.blocks.{j}.attn.'
            values = table_of_values(block.attn.position_bias, 5, spacing)
            state_dict[f'{attention}relative_position_bias_table.weight'] = values
            for name in KINDS[position_bias]:
                del state_dict[f'{attention}{name}']
    tables.load_state_dict(state_dict)
    image = torch.randn(1, 3, 90, 70, dtype=torch.float64)
    with torch.no_grad():
        assert_same_maps(tables(image), mlps(image), rtol=0, atol=1e-10)


def resized(table, window):
    side = math.isqrt(len(table))
    image = torch.stack([table[side * row : side * (row + 1)].T for row in range(side)], 1)  # (heads, side, side)
    image = F.interpolate(image[None], size=(2 * window - 1, 2 * window - 1), mode='bicubic')[0]
    return torch.cat([image[:, row].T for row in range(2 * window - 1)])


def assert_tables_are_resized(backbone, state_dict, windows):
    """Its tables are those of the state dict resized to the window of each stage, all else is as there."""
    for name, value in backbone.state_dict().items():
        if name.endswith('relative_position_bias_table.weight'):
            torch.testing.assert_close(value, resized(state_dict[name], windows[int(name.split('.')[1])]))
        elif name == 'pretrained_windows':
            assert value.tolist() == [*windows]
        else:
            assert torch.equal(value, state_dict[name]), name


def test_set_window_size_resizes_the_tables_and_their_windows_follow(build_small):
    backbone = build_small(position_bias='parameterized', window_size=4).eval()
    state_dict = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert backbone.pretrained_window_sizes == (4, 4, 4, 4)
    image = torch.randn(1, 3, 150, 90)
    windows = (7, 3, 6, 4)
    with torch.no_grad():
        before = backbone(image)
        backbone.set_window_size(windows)
        assert backbone.window_size == backbone.pretrained_window_sizes == windows
        assert_tables_are_resized(backbone, state_dict, windows)
        fresh = build_small(position_bias='parameterized', window_size=windows).eval()
        fresh.load_state_dict(backbone.state_dict())
        after = backbone(image)
        assert_same_maps(after, fresh(image), rtol=0, atol=0)
    assert (after[0] - before[0]).abs().max() > 0.01


@pytest.mark.parametrize('windows', [(6, 6, 6, 6), (4, 4, 4, 4), (3, 5, 4, 2)])
def test_a_parameterized_checkpoint_loads_into_other_windows(build_small, tmp_path, windows):
    source = build_small(position_bias='parameterized', window_size=4)
    torch.save(source.state_dict(), tmp_path / 'window4.pth')
    backbone = build_small(position_bias='parameterized', window_size=windows)
    report = load_pretrained(backbone, tmp_path / 'window4.pth')
    assert_tables_are_resized(backbone, source.state_dict(), windows)
    assert report.converted == {
        f'layers.{i}.blocks.{j}.attn.relative_position_bias_table.weight': 'table resized bicubically'
        for i in range(4)
        for j in range(2)
        if windows[i] != 4
    }
    assert report.checkpoint_window_size == report.checkpoint_pretrained_window_sizes == (4, 4, 4, 4)
    assert report.window_size == report.pretrained_window_sizes == backbone.pretrained_window_sizes == windows


@pytest.mark.parametrize('block', [0, 1])
@pytest.mark.parametrize('shape', [(48, 2), (36, 2), (49,), (7, 7, 2), (0, 2), (49, 3)])
def test_a_parameterized_checkpoint_with_a_damaged_table_loads_nothing(build_small, block, shape):
    state_dict = build_small(position_bias='parameterized', window_size=4).state_dict()
    state_dict[f'layers.1.blocks.{block}.attn.relative_position_bias_table.weight'] = torch.ones(shape)
    backbone = build_small(position_bias='parameterized', window_size=6)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'table.*\(.*\).*damaged') as error:
        load_pretrained(backbone, state_dict)
    assert '\n' not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_a_parameterized_state_dict_loads_strictly_into_other_windows(build_small, log, prefix):
    state_dict = build_small(position_bias='parameterized', window_size=4).state_dict()
    backbone = build_small(position_bias='parameterized', window_size=6)
    detector = nn.ModuleDict({'backbone': backbone}) if prefix else backbone
    detector.load_state_dict({prefix + name: value for name, value in state_dict.items()})
    assert_tables_are_resized(backbone, state_dict, (6, 6, 6, 6))
    assert backbone.pretrained_window_sizes == backbone.window_size == (6, 6, 6, 6)
    assert not log.records


@pytest.mark.parametrize('theirs, ours', [(theirs, ours) for theirs in KINDS for ours in KINDS if theirs != ours])
def test_weights_of_one_position_bias_never_load_as_another(build_small, tmp_path, theirs, ours):
    state_dict = build_small(position_bias=theirs).state_dict()
    torch.save(state_dict, tmp_path / 'other.pth')
    backbone = build_small(position_bias=ours)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    message = f"it has position_bias='{theirs}' and the backbone position_bias='{ours}': pass position_bias='{theirs}'"
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(backbone, tmp_path / 'other.pth')
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    with pytest.raises(RuntimeError, match=r'Missing key.*[\s\S]*Unexpected key'):
        backbone.load_state_dict(state_dict)


BAD_ARGUMENTS = [
    ({'arch': 'nano'}, r"arch .*tiny, small, base, large, huge, giant.*'nano'"),
    ({'arch': {'embed_dims': 8, 'depths': (1,)}}, r"arch .*num_heads.*got \{'embed_dims': 8, 'depths': \(1,\)\}"),
    ({'arch': {'embed_dims': 8, 'depths': (1,), 'num_heads': (1,), 'heads': 1}}, r"arch .*num_heads.*'heads': 1"),
    ({'arch': {'embed_dims': 8, 'depths': (1, 1), 'num_heads': (1,)}}, r'arch .*depths.*num_heads.*\(1, 1\).*\(1,\)'),
    ({'arch': {'embed_dims': 8, 'depths': (1, 1), 'num_heads': (2, 3)}}, r'stage 1 of arch.*16 channels.*3 heads'),
    ({'window_size': (8, 8)}, r'window_size .*int or 4 ints.*got \(8, 8\)'),
    ({'window_size': 0}, r'window_size .*at least 1.*got 0'),
    ({'window_size': (8, 8, 8, -1)}, r'window_size .*at least 1.*got \(8, 8, 8, -1\)'),
    ({'window_size': 8.5}, r'window_size .*int.*got 8\.5'),
    ({'pretrained_window_sizes': (8, 8, 8)}, r'pretrained_window_sizes .*int or 4 ints.*got \(8, 8, 8\)'),
    ({'pretrained_window_sizes': 0}, r'pretrained_window_sizes .*at least 1.*got 0'),
    ({'position_bias': 'absolute'}, r"position_bias .*log_cpb, linear_cpb, parameterized, got 'absolute'"),
    ({'position_bias': None}, r'position_bias .*log_cpb, linear_cpb, parameterized, got None'),
    ({'position_bias': ['log_cpb']}, r"position_bias .*log_cpb, linear_cpb, parameterized, got \['log_cpb'\]"),
    (
        {'position_bias': 'parameterized', 'pretrained_window_sizes': (8, 8, 8, 4)},
        r"pretrained_window_sizes .*position_bias='parameterized'.*leave it out, got \(8, 8, 8, 4\)",
    ),
    ({'out_indices': (0, 4)}, r'out_indices .*0 to 3.*got \(0, 4\)'),
    ({'out_indices': (-1,)}, r'out_indices .*0 to 3.*got \(-1,\)'),
    ({'out_indices': (2, 1)}, r'out_indices .*increasing.*got \(2, 1\)'),
    ({'out_indices': ()}, r'out_indices .*0 to 3.*got \(\)'),
    ({'out_indices': 3}, r'out_indices .*0 to 3.*got 3'),
    ({'frozen_stages': 5}, r'frozen_stages .*-1 to 4.*got 5'),
    ({'frozen_stages': -2}, r'frozen_stages .*-1 to 4.*got -2'),
    ({'init_cfg': {'type': 'Kaiming', 'layer': 'Linear'}}, r"init_cfg .*Pretrained.*got \{'type': 'Kaiming'"),
    ({'init_cfg': {'type': 'Kaiming', 'checkpoint': 'a'}}, r"init_cfg .*Pretrained.*got \{'type': 'Kaiming'"),
    ({'init_cfg': {'type': 'Pretrained'}}, r"init_cfg .*checkpoint.*got \{'type': 'Pretrained'\}"),
    ({'init_cfg': [{'type': 'Pretrained', 'checkpoint': 'a'}]}, r'init_cfg .*checkpoint.*got \[\{'),
]


@pytest.mark.parametrize('arguments, message', BAD_ARGUMENTS, ids=[str(arguments) for arguments, _ in BAD_ARGUMENTS])
def test_a_bad_argument_is_named_with_its_value_and_the_cure(build_small, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_small(**arguments).init_weights()


@pytest.mark.parametrize('position_bias', KINDS)
@pytest.mark.parametrize(
    'windows, message',
    [((8, 8), r'window_size .*4 ints.*got \(8, 8\)'), ((8, 8, 8, 0), r'window_size .*at least 1.*got \(8, 8, 8, 0\)')],
)
def test_set_window_size_refuses_what_the_constructor_refuses(build_small, position_bias, windows, message):
    backbone = build_small(window_size=5, position_bias=position_bias)
    with pytest.raises(ValueError, match=message):
        backbone.set_window_size(windows)
    assert backbone.window_size == backbone.pretrained_window_sizes == (5, 5, 5, 5)


def test_a_plain_load_of_official_weights_takes_the_windows_of_their_tables(build_small, monkeypatch):
    logged = []
    monkeypatch.setattr('swinv2_mm.messages.print_log', lambda message, **kwargs: logged.append(message))
    state_dict = {name: w for name, w in build_small().state_dict().items() if name != 'pretrained_windows'}
    tables = {
        f'layers.{i}.blocks.0.attn.relative_coords_table': log_spaced_coordinates(8, 8, window)[None]
        for i, window in enumerate((12, 12, 12, 6))
    }
    backbone = build_small()
    backbone.load_state_dict({**state_dict, **tables}, strict=False)
    assert backbone.pretrained_window_sizes == (12, 12, 12, 6)
    assert backbone.pretrained_windows.tolist() == [12, 12, 12, 6]
    assert logged == []

    backbone.load_state_dict(state_dict)
    (message,) = logged
    assert message.endswith('pretrained_window_sizes stays (12, 12, 12, 6)')
    build_small(pretrained_window_sizes=5).load_state_dict(state_dict)
    assert len(logged) == 1  # the argument said it
    given = build_small(pretrained_window_sizes=5)
    given.load_state_dict({**state_dict, **tables}, strict=False)
    assert given.pretrained_window_sizes == (5, 5, 5, 5)
    assert 'says pretrained_window_sizes=(12, 12, 12, 6), the argument says (5, 5, 5, 5)' in logged[1]
