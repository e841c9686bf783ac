"""Parameter groups: who learns how fast and who decays, parameter by parameter."""

import re

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from torch import nn

from swinv2_mm import SwinTransformerV2

BASE_LR, BASE_WD = 0.1, 0.5


class Detector(nn.Module):
    """A backbone and what may follow it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.MultiheadAttention(8, 2))
        self.query_embed = nn.Embedding(5, 8)


def groups(model, **paramwise_cfg):
    """Learning rate and weight decay over the base values, by parameter name."""
    optimizer = dict(type='AdamW', lr=BASE_LR, weight_decay=BASE_WD)
    wrapper = build_optim_wrapper(
        model,
        dict(constructor='SwinV2OptimWrapperConstructor', optimizer=optimizer, paramwise_cfg=paramwise_cfg),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group['lr'] / BASE_LR, group['weight_decay'] / BASE_WD))
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    ]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize('position_bias', ['log_cpb', 'linear_cpb', 'parameterized'])
def test_norms_biases_logit_scales_and_position_biases_alone_do_not_decay(build_small, position_bias):
    model = Detector(build_small(position_bias=position_bias))
    found = groups(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    weights = (nn.Linear, nn.Conv2d, nn.Embedding)
    decaying = {f'{name}.weight' for name, module in model.named_modules() if isinstance(module, weights)}
    decaying = {name for name in decaying if 'cpb_mlp' not in name and 'position_bias' not in name}
    decaying.add('head.2.in_proj_weight')
    assert {name for name, (_, decay) in found.items() if decay == 1} == decaying
    assert {name for name, (_, decay) in found.items() if decay == 0} == set(found) - decaying
    assert {rate for rate, _ in found.values()} == {1}
    free = r'attn\.logit_scale|attn\.[qv]_bias|blocks\.\d\.norm1\.weight|mlp\.fc1\.bias|attn\.proj\.bias'
    assert sum(bool(re.search(free, name)) for name in set(found) - decaying) == 6 * 8


def test_each_layer_learns_at_a_share_of_the_next_ones_rate():
    model = Detector(SwinTransformerV2('tiny', drop_path_rate=0))
    rates = {name: rate for name, (rate, _) in groups(model, decay_rate=0.9).items()}
    depths = {  # of 12 blocks: the head has depth 13, and rate 0.9 ** (13 - depth)
        'patch_embed.proj.weight': 0,
        'patch_embed.norm.bias': 0,
        'layers.0.blocks.0.attn.qkv.weight': 1,
        'layers.0.blocks.1.attn.cpb_mlp.2.weight': 2,
        'layers.0.downsample.reduction.weight': 2,
        'layers.0.downsample.norm.weight': 2,
        'layers.1.blocks.0.norm1.weight': 3,
        'layers.1.downsample.norm.bias': 4,
        'layers.2.blocks.0.mlp.fc2.weight': 5,
        'layers.2.blocks.5.attn.logit_scale': 10,
        'layers.2.downsample.reduction.weight': 10,
        'layers.3.blocks.0.attn.q_bias': 11,
        'layers.3.blocks.1.attn.proj.weight': 12,
        'norm0.weight': 13,
        'norm3.bias': 13,
    }
    for name, depth in depths.items():
        assert rates[f'backbone.{name}'] == pytest.approx(0.9 ** (13 - depth)), name
    assert rates['head.0.weight'] == rates['query_embed.weight'] == 1
    for i, depth in enumerate((2, 2, 6, 2)):
        for j in range(depth):
            block = {rate for name, rate in rates.items() if name.startswith(f'backbone.layers.{i}.blocks.{j}.')}
            assert len(block) == 1
    assert len(set(rates.values())) == 14


@pytest.mark.parametrize('kind', [dict, ConfigDict])
def test_groups_are_plain_dicts(build_small, kind):
    """torch.compile reads no others, and a config's optimizer is a ConfigDict."""
    cfg = kind(constructor='SwinV2OptimWrapperConstructor', optimizer=dict(type='SGD', lr=BASE_LR, weight_decay=0.1))
    wrapper = build_optim_wrapper(build_small(), cfg)
    assert {type(group) for group in wrapper.optimizer.param_groups} == {dict}
    assert len(wrapper.optimizer.param_groups) == 2


def test_custom_keys_multiply_and_the_longest_counts(build_small):
    keys = {'backbone': dict(lr_mult=0.1), 'backbone.norm': dict(lr_mult=2), 'query': dict(decay_mult=0)}
    found = groups(Detector(build_small()), decay_rate=0.5, custom_keys=keys)
    assert found['backbone.layers.3.blocks.1.mlp.fc1.weight'] == pytest.approx((0.05, 1))
    assert found['backbone.layers.3.blocks.1.mlp.fc1.bias'] == pytest.approx((0.05, 0))
    assert found['backbone.norm3.weight'] == pytest.approx((2, 0))
    assert found['query_embed.weight'] == (1, 0)
    assert found['head.0.weight'] == (1, 1)


def test_frozen_parameters_are_in_no_group(build_small):
    found = groups(Detector(build_small(frozen_stages=2)))
    frozen = ('patch_embed', 'layers.0.', 'layers.1.', 'norm0.', 'norm1.')
    assert not any(name.startswith(tuple(f'backbone.{module}' for module in frozen)) for name in found)
    assert any(name.startswith('backbone.layers.2') for name in found)


def test_a_step_moves_each_group_at_its_rate(build_small):
    """SGD without decay moves by rate times gradient: the groups reach the optimizer."""
    model = build_small()
    optimizer = dict(type='SGD', lr=BASE_LR, weight_decay=0.0)
    wrapper = build_optim_wrapper(
        model,
        dict(constructor='SwinV2OptimWrapperConstructor', optimizer=optimizer, paramwise_cfg=dict(decay_rate=0.5)),
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sum(x.square().mean() for x in model(torch.randn(1, 3, 32, 32))).backward()
    wrapper.step()
    for name, rate in {
        'patch_embed.proj.weight': 0.5**9,
        'layers.3.blocks.1.attn.proj.weight': 0.5,
        'norm0.bias': 1,
    }.items():
        parameter = model.get_parameter(name)
        expected = before[name] - BASE_LR * rate * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-8)
        assert not torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(custom_keys=dict(query_feat=dict(decay_mult=0))), "custom_keys has 'query_feat', .* no parameter name"),
        (dict(custom_keys=dict(absolute_pos_embed=dict(decay_mult=0))), "custom_keys has 'absolute_pos_embed'"),
        (
            dict(custom_keys=dict(head=dict(lr_mul=0))),
            r"custom_keys\['head'\] must be a dict of numbers lr_mult and decay_mult",
        ),
        (dict(norm_decay_mult=0), "takes decay_rate and custom_keys, got 'norm_decay_mult'"),
        (dict(decay_rate=0), 'decay_rate must be more than 0 and at most 1, got 0'),
        (dict(decay_rate='x'), "decay_rate must be more than 0 and at most 1, got 'x'"),
        (dict(custom_keys=dict(head=dict(lr_mult='a'))), r"custom_keys\['head'\] must be .*numbers"),
        (dict(custom_keys=dict(head=3)), r"custom_keys\['head'\] must be .* got 3"),
        (dict(decay_rate=1.5), 'decay_rate must be more than 0 and at most 1, got 1.5'),
    ],
)
def test_a_wrong_option_is_an_error(build_small, options, message):
    with pytest.raises(ValueError, match=message):
        groups(Detector(build_small()), **options)


def test_a_model_without_the_backbone_and_an_optimizer_without_rates_are_errors(build_small):
    with pytest.raises(ValueError, match='Linear has no SwinTransformerV2'):
        groups(nn.Linear(2, 2))
    cfg = dict(constructor='SwinV2OptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1))
    with pytest.raises(ValueError, match='optimizer must have lr and weight_decay'):
        build_optim_wrapper(build_small(), cfg)
