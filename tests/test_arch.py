"""The shapes of a backbone's parameters without building it, and its arguments from its weights."""

import pytest
import torch

from swinv2_mm import SwinTransformerV2
from swinv2_mm.arch import ARCHS, infer_arguments, parameter_shapes, parse_arch

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


def shapes_of(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


@pytest.mark.parametrize('arguments', VARIATIONS, ids=str)
def test_shapes_are_those_of_the_backbone(arguments):
    assert parameter_shapes(**arguments, window_size=WINDOWS) == shapes_of(weights_of(**arguments))


@pytest.mark.parametrize('arguments', VARIATIONS, ids=str)
def test_arguments_are_inferred_from_the_weights(arguments):
    assert infer_arguments(weights_of(**arguments)) == {**DEFAULTS, **arguments}


@pytest.mark.parametrize('mlp_ratio', [1 / 3, 2.7, 8 / 3, 3.3])
def test_inferred_arguments_give_the_shapes_of_a_hidden_dimension_that_is_rounded(mlp_ratio):
    weights = weights_of(mlp_ratio=mlp_ratio)
    assert parameter_shapes(**infer_arguments(weights)) == shapes_of(weights)


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
    'arch, message',
    [
        ('nano', r"arch .*tiny, small, base, large, huge, giant.*'nano'"),
        ({**SMALL, 'depths': (3, 0, 4)}, r'depths of arch .*at least 1.*got \(3, 0, 4\)'),
        ({**SMALL, 'num_heads': (1, 0, 4)}, r'arch .*num_heads|stage 1 of arch'),
        ({**SMALL, 'num_heads': (1, 3, 4)}, r'stage 1 of arch has 16 channels.* 3 heads'),
    ],
)
def test_an_arch_that_is_none_has_no_shapes(arch, message):
    with pytest.raises(ValueError, match=message):
        parameter_shapes(arch)
