"""Continuous position bias against the paper's formula in plain numpy, and when a kept bias is dropped."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from swinv2_mm.position_bias import ContinuousPositionBias, log_spaced_coordinates

SHAPES = [(3, 5), (1, 4), (5, 2)]


def log_spaced(offset, pretrained_window):
    scaled = 8 * offset / (pretrained_window - 1) if pretrained_window > 1 else 8 * offset
    return math.copysign(math.log2(1 + abs(scaled)) / 3, scaled)


def bias_pair_by_pair(module, height, width):
    """Equation 4 and 16 * sigmoid for every (query, key) pair, in float64: (heads, h*w, h*w)."""
    weight1, bias1, weight2 = (p.detach().double().numpy() for p in module.parameters())
    tokens = [(row, column) for row in range(height) for column in range(width)]
    bias = np.empty((len(weight2), len(tokens), len(tokens)))
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            coordinates = [log_spaced(q - k, module.pretrained_window) for q, k in zip(query, key)]
            bias[:, i, j] = 16 / (1 + np.exp(-weight2 @ np.maximum(weight1 @ coordinates + bias1, 0)))
    return torch.from_numpy(bias)


def assert_bias_is_that_of_the_weights(module, biases, dtype=torch.float32, tolerance=2e-5):
    for (height, width), bias in zip(SHAPES, biases, strict=True):
        assert bias.dtype == dtype
        expected = bias_pair_by_pair(module, height, width)[None]
        torch.testing.assert_close(bias.detach().double(), expected, rtol=0, atol=tolerance)


@pytest.fixture
def module(randomize):
    return randomize(ContinuousPositionBias(num_heads=3, pretrained_window=8)).eval()


@pytest.fixture
def computed(monkeypatch):
    """The shapes of every computation of a bias, call by call."""
    calls, compute = [], ContinuousPositionBias._compute
    monkeypatch.setattr(
        ContinuousPositionBias, '_compute', lambda self, shapes: calls.append(list(shapes)) or compute(self, shapes)
    )
    return calls


@pytest.mark.parametrize(
    'height, width, pretrained_window',
    [(8, 8, 8), (16, 16, 8), (3, 5, 12), (5, 3, 12), (1, 1, 6), (4, 7, 1), (4, 7, 2), (20, 32, 6)],
)
def test_coordinates_are_log_spaced_offsets_over_the_pretrained_window(height, width, pretrained_window):
    expected = np.array(
        [
            [
                [log_spaced(row, pretrained_window), log_spaced(column, pretrained_window)]
                for column in range(1 - width, width)
            ]
            for row in range(1 - height, height)
        ]
    )
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        coordinates = log_spaced_coordinates(height, width, pretrained_window, dtype=dtype)
        torch.testing.assert_close(coordinates, torch.from_numpy(expected).to(dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize('pretrained_window', [1, 4, 12])
def test_bias_of_rectangular_windows_is_the_mlp_of_every_pair(randomize, pretrained_window):
    module = randomize(ContinuousPositionBias(num_heads=3, pretrained_window=pretrained_window)).double()
    assert_bias_is_that_of_the_weights(module, module(SHAPES), torch.float64, 1e-12)


def test_bias_is_computed_once_in_eval(module, computed):
    with torch.no_grad():
        first, again = module(SHAPES), module(SHAPES)
        module([(3, 5), (2, 2)])
    assert computed == [SHAPES, [(2, 2)]]
    assert_bias_is_that_of_the_weights(module, again)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_bias_is_computed_at_every_forward_in_training(module, computed):
    module.train()
    with torch.no_grad():
        module(SHAPES)
        module[2].weight.data.neg_()
        assert_bias_is_that_of_the_weights(module, module(SHAPES))
    assert len(computed) == 2


def load_other_weights(module):
    module.load_state_dict({name: -value for name, value in module.state_dict().items()})


def load_other_weights_inside_a_parent(module):
    parent = nn.ModuleDict({'child': module})
    parent.load_state_dict({name: -value for name, value in parent.state_dict().items()}, assign=True)


def change_a_weight_in_place(module):
    with torch.no_grad():
        module[2].weight.neg_()


def change_a_weight_through_data_before_eval(module):
    module[2].weight.data.neg_()  # as the EMA and mean teacher hooks of mmengine and mmdet do, uncounted by PyTorch
    module.eval()  # as their loops do afterwards


def step_an_optimizer(module):
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def replace_a_weight(module):
    old = module[2].weight
    module[2].weight = nn.Parameter(-old.detach())
    with torch.no_grad():
        while module[2].weight._version < old._version:  # the version counter alone does not give it away
            module[2].weight.mul_(1)


@pytest.mark.parametrize(
    'change',
    [
        load_other_weights,
        load_other_weights_inside_a_parent,
        change_a_weight_in_place,
        change_a_weight_through_data_before_eval,
        step_an_optimizer,
        replace_a_weight,
        lambda module: module.train().eval(),
        lambda module: module.eval(),
        lambda module: nn.ModuleDict({'child': module}).eval(),
    ],
)
def test_kept_bias_is_dropped_when_weights_or_mode_change(module, computed, change):
    with torch.no_grad():
        module(SHAPES)
    change(module)
    with torch.no_grad():
        assert_bias_is_that_of_the_weights(module, module(SHAPES))
    assert computed == [SHAPES, SHAPES]


def test_kept_bias_is_dropped_when_the_dtype_changes(module):
    with torch.no_grad():
        module(SHAPES)
        assert_bias_is_that_of_the_weights(module.double(), module(SHAPES), torch.float64, 1e-12)


@pytest.mark.parametrize('updates', range(1, 5))  # one of them brings the copy to the original's version counters
def test_a_copy_keeps_no_bias_of_the_original(module, updates):
    with torch.no_grad():
        module(SHAPES)
        other = copy.deepcopy(module)
        for parameter in list(other.parameters()) * updates:
            parameter.mul_(0.5)
        assert_bias_is_that_of_the_weights(other, other(SHAPES))
        assert_bias_is_that_of_the_weights(module, module(SHAPES))


def test_set_window_size_drops_the_bias_of_the_old_windows(build_small, computed):
    backbone = build_small(arch={'embed_dims': 8, 'depths': (1,), 'num_heads': (1,)}, out_indices=(0,)).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for window_size in (4, 3, 4):
            backbone.set_window_size(window_size)
            backbone(image)
            backbone(image)
    assert computed == [[(4, 4)], [(3, 3), (3, 2), (2, 3), (2, 2)], [(4, 4)]]


def test_gradients_reach_the_weights_in_eval_even_after_a_bias_was_kept(module):
    module.double()
    names = [name for name, _ in module.named_parameters()]
    with torch.no_grad():
        module(SHAPES)

    def biases(*parameters):
        return tuple(torch.func.functional_call(module, dict(zip(names, parameters)), (SHAPES,)))

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(biases, parameters, fast_mode=True)
    sum(bias.square().sum() for bias in module(SHAPES)).backward()
    sum(bias.square().sum() for bias in biases(*parameters)).backward()
    for own, checked in zip(module.parameters(), parameters):
        assert own.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, checked.grad, rtol=1e-12, atol=0)


def test_bias_kept_under_inference_mode_serves_a_forward_with_gradients(module, computed):
    module.requires_grad_(False)
    with torch.inference_mode():
        module(SHAPES)
    factor = torch.ones((), requires_grad=True)
    bias = module(SHAPES)[0]
    (factor.exp() * bias).sum().backward()  # an inference tensor could not be saved for backward
    assert computed == [SHAPES]
    torch.testing.assert_close(factor.grad, math.e * bias_pair_by_pair(module, *SHAPES[0]).sum().float())


@pytest.mark.parametrize('training', [False, True])
def test_bias_is_computed_in_float32_under_bfloat16_autocast(module, training):
    with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(training):
        assert_bias_is_that_of_the_weights(module, module.train(training)(SHAPES))


def test_bias_of_bfloat16_weights_is_computed_in_float32(module):
    assert_bias_is_that_of_the_weights(module.bfloat16(), module(SHAPES))


def test_state_dict_has_parameters_and_pretrained_windows_alone(build_small):
    backbone = build_small(window_size=4, pretrained_window_sizes=(5, 4, 3, 2)).eval()
    with torch.no_grad():
        backbone(torch.randn(1, 3, 33, 33))
    others = {k: v for k, v in backbone.state_dict().items() if k not in dict(backbone.named_parameters())}
    assert list(others) == ['pretrained_windows']
    assert others['pretrained_windows'].dtype == torch.int64
    assert others['pretrained_windows'].tolist() == [5, 4, 3, 2]
