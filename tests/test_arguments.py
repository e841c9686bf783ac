"""The arguments of a backbone from its weights, and whether these are all of one."""

import pytest
import torch

from swinv2_mm import CheckpointError, SwinTransformerV2
from swinv2_mm.arch import ARCHS, parse_arch
from swinv2_mm.checkpoints.arguments import infer_arguments
from swinv2_mm.checkpoints.fitting import MAX_BLOCKS, check_complete
from swinv2_mm.checkpoints.loading import read_weights

WINDOWS = (7, 4, 5, 2)
SMALL = dict(embed_dims=8, depths=(3, 1, 4), num_heads=(1, 2, 4))
EXTRA_NORMS = {**SMALL, 'extra_norm_every_n_blocks': 2}
DEFAULTS = dict(arch='tiny', in_channels=3, patch_size=4, mlp_ratio=4.0, qkv_bias=True, position_bias='log_cpb')
VARIATIONS = [
    *(dict(arch=arch) for arch in ARCHS),
    dict(in_channels=1),
    dict(patch_size=2),
    dict(mlp_ratio=2.5),
    dict(qkv_bias=False),
    dict(position_bias='linear_cpb'),
    dict(position_bias='parameterized'),
    dict(arch='giant', position_bias='parameterized', qkv_bias=False, in_channels=7),
    dict(arch=SMALL),
    dict(arch=EXTRA_NORMS),
    dict(arch=EXTRA_NORMS, in_channels=5, patch_size=8, mlp_ratio=1.0, qkv_bias=False, position_bias='linear_cpb'),
]


def weights_of(arch='tiny', **arguments):
    """The weights of a backbone, without memory: no output norms and no windows."""
    num_stages = len(parse_arch(arch).depths)
    with torch.device('meta'):
        backbone = SwinTransformerV2(arch, window_size=WINDOWS[:num_stages], out_indices=(num_stages - 1,), **arguments)
    return {
        name: value
        for name, value in backbone.state_dict().items()
        if not name.startswith('norm') and name != 'pretrained_windows'
    }


@pytest.mark.parametrize('arguments', VARIATIONS, ids=str)
def test_arguments_are_inferred_from_the_weights(arguments):
    assert infer_arguments(weights_of(**arguments)) == {**DEFAULTS, **arguments}


@pytest.mark.parametrize('mlp_ratio', [1 / 3, 2.7, 8 / 3, 3.3])
def test_inferred_arguments_give_the_shapes_of_a_hidden_dimension_that_is_rounded(mlp_ratio):
    weights = weights_of(mlp_ratio=mlp_ratio)
    again = weights_of(**infer_arguments(weights))
    assert {name: value.shape for name, value in again.items()} == {n: value.shape for n, value in weights.items()}


def test_an_arch_that_has_a_name_is_called_by_it():
    arch = dict(embed_dims=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48])
    assert infer_arguments(weights_of(arch))['arch'] == 'large'


def test_output_norms_and_other_weights_tell_nothing():
    weights = weights_of(EXTRA_NORMS)
    others = dict.fromkeys(['norm1.weight', 'pretrained_windows', 'head.weight', 'layers.9.x'], torch.ones(3))
    assert infer_arguments({**others, **weights}) == {**DEFAULTS, 'arch': EXTRA_NORMS}


@pytest.mark.parametrize('position_bias', ['log_cpb', 'linear_cpb', 'parameterized'])
def test_without_a_weight_there_are_no_arguments_or_those_that_the_others_tell(position_bias):
    arch = {**SMALL, 'depths': (2, 1, 1), 'extra_norm_every_n_blocks': 2}  # one extra norm
    weights = weights_of(arch, position_bias=position_bias)
    complete = {**DEFAULTS, 'arch': arch, 'position_bias': position_bias}
    telling = {  # what may be inferred without a weight that tells something
        'patch_embed.proj.weight': [None],
        'layers.0.blocks.0.attn.relative_position_bias_table.weight': [None],
        **{f'layers.{i}.blocks.0.attn.logit_scale': [None] for i in range(3)},
        **{f'layers.{i}.blocks.0.mlp.fc1.weight': [None, complete] for i in range(3)},  # one of them tells it
        'layers.0.blocks.0.attn.q_bias': [{**complete, 'qkv_bias': False}],
        'layers.0.blocks.1.norm3.weight': [{**complete, 'arch': {**SMALL, 'depths': (2, 1, 1)}}],
    }
    for name in weights:
        rest = {other: value for other, value in weights.items() if other != name}
        assert infer_arguments(rest) in telling.get(name, [complete]), name


@pytest.mark.parametrize(
    'kept', ['^', 'patch_embed', 'layers', 'layers.0', 'layers.1'], ids=['nothing', 'patch_embed', 'layers', '0', '1']
)
def test_a_part_of_the_weights_has_no_arguments(kept):
    assert infer_arguments({name: w for name, w in weights_of(SMALL).items() if name.startswith(kept)}) is None


@pytest.mark.parametrize('stage', [0, 1])
def test_weights_without_a_stage_have_no_arguments(stage):
    weights = {name: w for name, w in weights_of(SMALL).items() if not name.startswith(f'layers.{stage}.')}
    assert infer_arguments(weights) is None


@pytest.mark.parametrize('shape', [(), (0,), (5,), (3, 0), (3, 1, 1), (0, 1, 1), (0, 3, 4, 4), (5, 3, 4, 4), (1,) * 5])
@pytest.mark.parametrize(
    'name', ['patch_embed.proj.weight', 'layers.0.blocks.0.mlp.fc1.weight', 'layers.1.blocks.0.attn.logit_scale']
)
def test_a_weight_of_another_shape_gives_no_arguments_or_those_of_a_backbone(name, shape):
    arguments = infer_arguments({**weights_of(SMALL), name: torch.empty(shape)})
    assert arguments is None or parse_arch(arguments['arch'])


@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(in_channels=5, patch_size=8, mlp_ratio=2.5, qkv_bias=False, arch=EXTRA_NORMS),
        dict(position_bias='linear_cpb'),
        dict(position_bias='parameterized'),
    ],
    ids=str,
)
def test_weights_are_complete_if_each_is_there_in_its_shape(randomize, arguments):
    backbone = SwinTransformerV2(**{'arch': SMALL, 'window_size': WINDOWS[:3], 'out_indices': (0, 1, 2), **arguments})
    weights = randomize(backbone).state_dict()
    expected = {**DEFAULTS, 'arch': SMALL, **arguments}
    assert check_complete(*read_weights(weights), SwinTransformerV2) == expected
    without_norm = {name: value for name, value in weights.items() if not name.startswith('norm1')}
    assert check_complete(*read_weights(without_norm), SwinTransformerV2) == expected
    name = 'layers.2.blocks.1.mlp.fc1.weight'
    for message, change in {
        f'it lacks {name}:': {},
        f'it has {name} of shape': {name: weights[name][:-1]},
        f'{name} holds NaN': {name: weights[name] / 0},
        'it has layers.2.blocks.1.other, which': {name: weights[name], 'layers.2.blocks.1.other': torch.ones(1)},
        'it lacks norm1.bias:': {name: weights[name], 'norm1.bias': None},
    }.items():
        changed = {**weights, name: None, **change}
        changed = {name: value for name, value in changed.items() if value is not None}
        with pytest.raises(CheckpointError) as error:
            check_complete(*read_weights(changed), SwinTransformerV2)
        assert message in str(error.value) and '\n' not in str(error.value)


def blocks(depths, embed_dims):
    """The weights that tell an architecture, with empty blocks."""
    weights = {
        'patch_embed.proj.weight': torch.rand(embed_dims, 3, 4, 4),
        'layers.0.downsample.norm.weight': torch.rand(1),
    }
    for i, depth in enumerate(depths):
        weights[f'layers.{i}.blocks.0.attn.logit_scale'] = torch.rand(1, 1, 1)
        weights.update({f'layers.{i}.blocks.{j}.norm1.weight': torch.rand(1) for j in range(depth)})
    last = f'layers.{len(depths) - 1}.blocks.0.mlp.fc1.weight'
    return {**weights, 'layers.0.blocks.0.attn.cpb_mlp.2.weight': torch.rand(1), last: torch.rand(4, 1)}


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        (blocks((MAX_BLOCKS, 1), 8), f'it names {MAX_BLOCKS + 1} blocks, and '),
        (blocks((30_000,), 8), 'it names 30000 blocks, and '),
        (blocks((1,) * 100, 8), "its shapes are those of arch={'embed_dims': 8, 'depths': (1, 1, 1, "),
        (blocks((1,) * 45, 100_000), 'which cannot be built: it is damaged'),
        (blocks((1, 1), 1_000_000), 'it lacks '),
    ],
    ids=['more blocks', 'far more blocks', 'many stages', 'wide stages', 'wide'],
)
def test_absurd_sizes_are_refused(weights, message):
    with pytest.raises(CheckpointError) as error:
        check_complete(*read_weights(weights), SwinTransformerV2)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_a_whole_backbone_may_be_deeper_than_any_published_one():
    arch = dict(embed_dims=4, depths=(MAX_BLOCKS + 1,), num_heads=(1,))
    backbone = SwinTransformerV2(arch, window_size=2, out_indices=(0,))
    assert check_complete(*read_weights(backbone.state_dict()), SwinTransformerV2)['arch'] == arch
