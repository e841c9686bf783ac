"""Each position bias against its formula in plain numpy, also after every change that can make a kept one stale."""

import copy
import math

import numpy as np
import pytest
import torch
from across_versions import ASSIGN
from mmengine.model import ExponentialMovingAverage
from torch import nn

from swinv2_mm import CheckpointError, load_pretrained, position_bias
from swinv2_mm.ops.common import fold_reversed_bias, reversed_window_bias, window_bias
from swinv2_mm.position_bias import (
    POSITION_BIASES,
    ContinuousPositionBias,
    LinearContinuousPositionBias,
    ParameterizedPositionBias,
    PositionBias,
    linear_spaced_coordinates,
    log_spaced_coordinates,
    resize_table,
    table_window,
    tables_at_once,
)

SHAPES = [(3, 5), (1, 4), (5, 2), (5, 5)]
LARGEST = (5, 5)
KINDS = [ContinuousPositionBias, LinearContinuousPositionBias, ParameterizedPositionBias]


def log_spaced(offset, pretrained_window):
    scaled = 8 * offset / (pretrained_window - 1) if pretrained_window > 1 else 8 * offset
    return math.copysign(math.log2(1 + abs(scaled)) / 3, scaled)


def linear_spaced(offset, pretrained_window):
    return offset / (pretrained_window - 1) if pretrained_window > 1 else float(offset)


def bias_pair_by_pair(module, height, width):
    """The bias of every (query, key) pair, in float64: (heads, h*w, h*w).

    Equation 4 or a linear spacing with 16 * sigmoid; or the entry of a table, row by row of the vertical offset.
    """
    *hidden, weight = (p.detach().double().numpy() for p in module.parameters())
    spaced = linear_spaced if isinstance(module, LinearContinuousPositionBias) else log_spaced
    window = module.pretrained_window
    tokens = [(row, column) for row in range(height) for column in range(width)]
    bias = np.empty((3, len(tokens), len(tokens)))
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            rows, columns = (q - k for q, k in zip(query, key))
            if isinstance(module, ParameterizedPositionBias):
                bias[:, i, j] = weight[(rows + window - 1) * (2 * window - 1) + columns + window - 1]
            else:
                weight1, bias1 = hidden
                features = np.maximum(weight1 @ [spaced(rows, window), spaced(columns, window)] + bias1, 0)
                bias[:, i, j] = 16 / (1 + np.exp(-weight @ features))
    return torch.from_numpy(bias)


def assert_bias_is_that_of_the_weights(module, table, dtype=torch.float32, tolerance=2e-5):
    assert table.dtype == dtype
    assert table.shape == (3, 2 * LARGEST[0] - 1, 2 * LARGEST[1] - 1)
    for height, width in SHAPES:
        bias = window_bias(table, height, width)
        expected = bias_pair_by_pair(module, height, width)
        torch.testing.assert_close(bias.detach().double(), expected, rtol=0, atol=tolerance)


@pytest.fixture(params=KINDS)
def module(request, randomize):
    return randomize(request.param(3, 8)).eval()


@pytest.fixture
def computed(monkeypatch):
    """The size of every computation of a table, call by call."""
    calls = []

    def counted(self, height, width, table=ContinuousPositionBias.table):
        calls.append((height, width))
        return table(self, height, width)

    monkeypatch.setattr(ContinuousPositionBias, 'table', counted)
    return calls


@pytest.fixture(params=KINDS[:2])
def continuous(request, randomize):
    return randomize(request.param(3, 8)).eval()


def last_weight(module):
    return [*module.parameters()][-1]


@pytest.mark.parametrize(
    'height, width, pretrained_window',
    [(8, 8, 8), (16, 16, 8), (3, 5, 12), (5, 3, 12), (1, 1, 6), (4, 7, 1), (4, 7, 2), (20, 32, 6)],
)
@pytest.mark.parametrize(
    'function, spaced', [(log_spaced_coordinates, log_spaced), (linear_spaced_coordinates, linear_spaced)]
)
def test_coordinates_are_spaced_offsets_over_the_pretrained_window(height, width, pretrained_window, function, spaced):
    expected = np.array(
        [
            [[spaced(row, pretrained_window), spaced(column, pretrained_window)] for column in range(1 - width, width)]
            for row in range(1 - height, height)
        ]
    )
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        coordinates = function(height, width, pretrained_window, dtype=dtype)
        torch.testing.assert_close(coordinates, torch.from_numpy(expected).to(dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize('kind', KINDS[:2])
@pytest.mark.parametrize('pretrained_window', [1, 4, 12])
def test_bias_of_rectangular_windows_is_the_mlp_of_every_pair(randomize, kind, pretrained_window):
    module = randomize(kind(num_heads=3, pretrained_window=pretrained_window)).double()
    assert_bias_is_that_of_the_weights(module, module(*LARGEST), torch.float64, 1e-12)


@pytest.mark.parametrize('window', [5, 6, 9])
def test_bias_of_windows_up_to_that_of_a_table_is_its_centre(randomize, window):
    module = randomize(ParameterizedPositionBias(num_heads=3, window=window)).double()
    assert module.pretrained_window == window
    assert_bias_is_that_of_the_weights(module, module(*LARGEST), torch.float64, 0)


@pytest.mark.parametrize('training', [False, True])
def test_a_bias_is_computed_once_where_no_gradient_is_needed(continuous, computed, training):
    continuous.train(training)
    with torch.no_grad():
        first, again = continuous(*LARGEST), continuous(*LARGEST)
    continuous.requires_grad_(False)
    assert torch.equal(continuous(*LARGEST), again) and torch.equal(again, first)
    assert computed == [LARGEST]
    assert_bias_is_that_of_the_weights(continuous, again)
    continuous(3, 5), continuous(3, 5)
    assert computed == [LARGEST, (3, 5)]


def test_a_bias_is_computed_at_every_forward_that_needs_a_gradient(continuous, computed):
    continuous(*LARGEST), continuous(*LARGEST)
    assert computed == [LARGEST] * 2


def load_other_weights(module):
    module.load_state_dict({name: -value for name, value in module.state_dict().items()})


def load_other_weights_inside_a_parent(module):
    parent = nn.ModuleDict({'child': module})
    parent.load_state_dict({name: -value for name, value in parent.state_dict().items()}, **ASSIGN)


def change_a_weight_in_place(module):
    with torch.no_grad():
        last_weight(module).neg_()


def change_data_in_place(module):
    last_weight(module).data.mul_(0.5).add_(0.1)  # as the hooks of a mean teacher do, uncounted by PyTorch


def set_data(module):
    last_weight(module).data = -last_weight(module).data


def set_data_as_a_sharded_module_does(module):
    for parameter in module.parameters():
        sharded = -parameter.detach().clone()
        parameter.data = torch.empty(0)
        parameter.data = sharded


def set_from_a_vector(module):
    vector = torch.nn.utils.parameters_to_vector(module.parameters())
    torch.nn.utils.vector_to_parameters(-vector, module.parameters())


def step(optimizer, **options):
    def change(module):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer(module.parameters(), lr=0.1, **options).step()

    change.__name__ = f'step_{optimizer.__name__}_{options}'
    return change


def replace_a_weight(module):
    old = last_weight(module)
    module[2].weight = nn.Parameter(-old.detach())


def share_memory_with_numpy(module):
    last_weight(module).detach().numpy()[:] = 0.25


FUSED = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW] if torch.__version__ >= (2, 5) else []  # on CPU


@pytest.mark.parametrize(
    'change',
    [
        load_other_weights,
        load_other_weights_inside_a_parent,
        change_a_weight_in_place,
        change_data_in_place,
        set_data,
        set_data_as_a_sharded_module_does,
        set_from_a_vector,
        replace_a_weight,
        share_memory_with_numpy,
        step(torch.optim.SGD),
        *(step(optimizer, fused=True) for optimizer in FUSED),
    ],
    ids=lambda change: change.__name__,
)
def test_a_kept_bias_is_never_stale(continuous, change):
    with torch.no_grad():
        before = continuous(*LARGEST).clone()
    change(continuous)
    with torch.no_grad():
        after = continuous(*LARGEST)
    assert (after - before).abs().max() > 1e-3
    assert_bias_is_that_of_the_weights(continuous, after)


def test_a_teacher_that_follows_a_student_gives_the_maps_of_its_weights(build_small, randomize):
    teacher = build_small(arch={'embed_dims': 8, 'depths': (1,), 'num_heads': (1,)}, out_indices=(0,)).eval()
    student = randomize(copy.deepcopy(teacher))
    image = torch.randn(1, 3, 32, 32)
    averaged = ExponentialMovingAverage(teacher, momentum=0.9)
    with torch.no_grad():
        averaged(image)  # which keeps its bias
        averaged.update_parameters(student), averaged.update_parameters(student)
        fresh = build_small(arch={'embed_dims': 8, 'depths': (1,), 'num_heads': (1,)}, out_indices=(0,)).eval()
        fresh.load_state_dict(averaged.module.state_dict())
        assert torch.equal(averaged(image)[0], fresh(image)[0])


def test_a_kept_bias_has_the_current_pretrained_window(continuous):
    with torch.no_grad():
        continuous(*LARGEST)
        continuous.pretrained_window = 5
        assert_bias_is_that_of_the_weights(continuous, continuous(*LARGEST))


def test_a_kept_bias_has_the_dtype_of_now(continuous):
    with torch.no_grad():
        continuous(*LARGEST)
        assert_bias_is_that_of_the_weights(continuous.double(), continuous(*LARGEST), torch.float64, 1e-12)
        assert_bias_is_that_of_the_weights(continuous.float(), continuous(*LARGEST))


@pytest.mark.parametrize('updates', range(1, 5))  # one of them brings the copy to the original's version counters
def test_a_copy_keeps_no_bias_of_the_original(module, updates):
    with torch.no_grad():
        module(*LARGEST)
        other = copy.deepcopy(module)
        for parameter in list(other.parameters()) * updates:
            parameter.mul_(0.5)
        assert_bias_is_that_of_the_weights(other, other(*LARGEST))
        assert_bias_is_that_of_the_weights(module, module(*LARGEST))


def test_set_window_size_gives_the_bias_of_the_new_windows(build_small, computed):
    backbone = build_small(arch={'embed_dims': 8, 'depths': (1,), 'num_heads': (1,)}, out_indices=(0,)).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for window_size in (4, 3, 4):
            backbone.set_window_size(window_size)
            backbone(image)
            backbone(image)
    assert computed == [(4, 4), (3, 3), (4, 4)]


def test_gradients_reach_the_weights_in_eval_even_after_a_bias_was_kept(module):
    module.double()
    names = [name for name, _ in module.named_parameters()]
    with torch.no_grad():
        module(*LARGEST)

    def table(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), LARGEST)

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(table, parameters, fast_mode=True)
    module(*LARGEST).square().sum().backward()
    table(*parameters).square().sum().backward()
    for own, checked in zip(module.parameters(), parameters):
        assert own.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, checked.grad, rtol=1e-12, atol=0)


def test_bias_kept_under_inference_mode_serves_a_forward_with_gradients(continuous, computed):
    continuous.requires_grad_(False)
    with torch.inference_mode():
        continuous(*LARGEST)
    factor = torch.ones((), requires_grad=True)
    sides = 5 - torch.arange(-4, 5).abs()
    pairs = sides[:, None] * sides  # of each offset
    (factor.exp() * continuous(*LARGEST) * pairs).sum().backward()  # an inference tensor could not be saved for this
    assert computed == [LARGEST]
    torch.testing.assert_close(factor.grad, math.e * bias_pair_by_pair(continuous, *LARGEST).sum().float())


def test_inference_tensors_as_weights_are_compared_too(continuous):
    with torch.inference_mode():
        weights = {name: value.clone() for name, value in continuous.state_dict().items()}
        other = type(continuous)(3, 8)
        other.load_state_dict(weights, **ASSIGN)
        other.requires_grad_(False)
        other(*LARGEST)
        last_weight(other).neg_()
        assert_bias_is_that_of_the_weights(other, other(*LARGEST))


@pytest.mark.parametrize('training', [False, True])
def test_bias_is_computed_in_float32_under_bfloat16_autocast(module, training):
    with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(training):
        assert_bias_is_that_of_the_weights(module, module.train(training)(*LARGEST))


def test_bias_of_bfloat16_weights_is_computed_in_float32(module):
    assert_bias_is_that_of_the_weights(module.bfloat16(), module(*LARGEST))


def test_state_dict_has_parameters_and_pretrained_windows_alone(build_small):
    backbone = build_small(window_size=4, pretrained_window_sizes=(5, 4, 3, 2)).eval()
    with torch.no_grad():
        backbone(torch.randn(1, 3, 33, 33))
    others = {k: v for k, v in backbone.state_dict().items() if k not in dict(backbone.named_parameters())}
    assert list(others) == ['pretrained_windows']
    assert others['pretrained_windows'].dtype == torch.int64
    assert others['pretrained_windows'].tolist() == [5, 4, 3, 2]


def cubic(distance):
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized_entry_by_entry(table, old_window, new_window):
    """Cubic convolution along both axes with half-pixel centres, where entries outside are those of the edge."""
    old, new = 2 * old_window - 1, 2 * new_window - 1
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    out = torch.empty(new**2, table.shape[1], dtype=torch.float64)
    for head in range(table.shape[1]):
        image = np.array([[table[row * old + column, head] for column in range(old)] for row in range(old)])
        for row, column in np.ndindex(new, new):
            out[row * new + column, head] = weights[row] @ image @ weights[column]
    return out


def random_table(window, heads=3):
    return torch.randn((2 * window - 1) ** 2, heads, dtype=torch.float64)


@pytest.mark.parametrize('old, new', [(4, 6), (6, 4), (5, 5), (2, 7), (7, 2), (1, 3), (3, 1)])
def test_resizing_a_table_is_cubic_convolution(old, new):
    table = random_table(old)
    before = table.clone()
    torch.testing.assert_close(resize_table(table, new), resized_entry_by_entry(before, old, new), rtol=0, atol=1e-12)
    assert torch.equal(table, before)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_table_in_half_precision_is_resized_in_float32(dtype):
    table = random_table(4).to(dtype)
    out = resize_table(table, 7)
    assert out.dtype == dtype
    expected = resized_entry_by_entry(table.double(), 4, 7)
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_window_of_a_table_is_that_of_its_offsets():
    for window in range(1, 10):
        offsets = {(i - k, j - m) for i, j, k, m in np.ndindex(*(window,) * 4)}
        assert table_window(torch.empty(len(offsets), 2)) == window


@pytest.mark.parametrize('shape', [(48, 3), (16, 3), (0, 3), (2, 49), (49,), (7, 7, 3), ()])
def test_a_table_of_no_window_is_an_error_with_its_shape(shape):
    for function in (table_window, lambda table: resize_table(table, 4)):
        with pytest.raises(ValueError, match=r'\(\(2W-1\)\^2, heads\) for window W, got \(') as error:
            function(torch.zeros(shape))
        assert str(error.value).endswith(f'got {shape}')


def test_gradient_of_a_table_counts_the_pairs_of_each_offset():
    module = ParameterizedPositionBias(num_heads=3, window=4)
    window_bias(module(3, 2), 3, 2).sum().backward()
    for row, column in np.ndindex(7, 7):
        pairs = max(3 - abs(row - 3), 0) * max(2 - abs(column - 3), 0)
        assert module.weight.grad[7 * row + column].tolist() == [pairs] * 3


@pytest.fixture
def table_of_6(randomize):
    """A module with a table for windows of 6, and the table."""
    module = randomize(ParameterizedPositionBias(num_heads=3, window=6)).double().eval()
    return module, module.weight.detach().clone()


@pytest.mark.parametrize('window', [3, 5, 6, 9])
def test_set_window_resizes_the_table(table_of_6, window):
    module, table = table_of_6
    parameter = module.weight.requires_grad_(False)
    parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        module(3, 3)
        module.set_window(window)
        assert module.weight is parameter and parameter.grad is None and not parameter.requires_grad
        assert module.pretrained_window == window
        torch.testing.assert_close(parameter, resized_entry_by_entry(table, 6, window), rtol=0, atol=1e-12)
        torch.testing.assert_close(window_bias(module(3, 3), 3, 3), bias_pair_by_pair(module, 3, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize('assign', [{}, ASSIGN], ids=str)
@pytest.mark.parametrize('window', [4, 6, 8])
def test_a_table_of_another_window_is_resized_when_loaded(table_of_6, window, assign):
    module, _ = table_of_6
    parent = nn.ModuleDict({'child': module})
    table = random_table(window)
    state_dict = {'child.weight': table.clone()}
    with torch.no_grad():
        module(3, 3)
        parent.load_state_dict(state_dict, **assign)
        assert torch.equal(state_dict['child.weight'], table)
        torch.testing.assert_close(module.weight, resized_entry_by_entry(table, window, 6), rtol=0, atol=1e-12)
        torch.testing.assert_close(window_bias(module(3, 3), 3, 3), bias_pair_by_pair(module, 3, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize('shape', [(121, 2), (49, 2), (120, 3), (121,)])
def test_a_table_of_other_heads_or_no_window_does_not_load(table_of_6, shape):
    module, table = table_of_6
    with pytest.raises((RuntimeError, ValueError), match=r'size mismatch for weight|got \('):
        module.load_state_dict({'weight': torch.ones(shape)})
    assert torch.equal(module.weight, table)


@pytest.mark.parametrize('height, width', [(1, 1), (3, 5), (5, 3), (1, 4), (4, 4)])
def test_the_reversed_bias_has_its_keys_last_to_first_and_folds_back_pair_by_pair(height, width):
    table = torch.randn(3, 13, 11, dtype=torch.float64)  # for windows up to 7 x 6
    tokens = [(row, column) for row in range(height) for column in range(width)]
    grad = torch.randn(3, len(tokens), len(tokens), dtype=torch.float64)
    bias, folded = torch.empty_like(grad), torch.zeros(3, 2 * height - 1, 2 * width - 1, dtype=torch.float64)
    for i, query in enumerate(tokens):
        for j, key in enumerate(reversed(tokens)):
            rows, columns = query[0] - key[0], query[1] - key[1]
            bias[:, i, j] = table[:, rows + 6, columns + 5]
            folded[:, rows + height - 1, columns + width - 1] += grad[:, i, j]
    assert torch.equal(reversed_window_bias(table, height, width), bias)
    assert torch.equal(window_bias(table, height, width), bias.flip(2))
    torch.testing.assert_close(fold_reversed_bias(grad, height, width), folded, rtol=0, atol=1e-12)


class Slope(PositionBias):
    """A kind that nothing knows but its class: a slope per head times the distance of two tokens."""

    kind, name, has_pretrained_window, pretrained_window = 'slope', 'slope', False, 1

    def __init__(self, num_heads, window):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(num_heads))

    def forward(self, height, width):
        return -self.weight[:, None, None] * linear_spaced_coordinates(height, width, 2).norm(dim=-1)


def test_a_new_kind_is_one_class(build_small, monkeypatch, tmp_path):
    monkeypatch.setitem(POSITION_BIASES, Slope.kind, Slope)
    backbone, image = build_small(position_bias='slope').eval(), torch.randn(1, 3, 50, 70)
    sum(out.sum() for out in backbone(image)).backward()
    assert all(block.attn.slope.weight.grad.abs().max() > 0 for stage in backbone.layers for block in stage.blocks)
    torch.save(backbone.state_dict(), tmp_path / 'slope.pth')
    loaded = build_small(position_bias='slope').eval()
    report = load_pretrained(loaded, tmp_path / 'slope.pth')
    assert not report.initial and not report.left_out and 'slope.pth' in str(report)
    for out, expected in zip(loaded(image), backbone(image)):
        assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="position_bias='slope'"):
        build_small(position_bias='slope', pretrained_window_sizes=4)
    with pytest.raises(CheckpointError, match="position_bias='slope'"):
        load_pretrained(build_small(), tmp_path / 'slope.pth')


def drawn_biases(kind, number=3):
    biases = [kind(3, 4) for _ in range(number)]
    for parameter in nn.ModuleList(biases).parameters():
        nn.init.normal_(parameter, std=0.3)
    return biases


def assert_tables_of_each(biases, height=5, width=3):
    """`tables_at_once` gives the values and gradients of each bias alone."""
    weights = torch.randn(len(biases), 3, 2 * height - 1, 2 * width - 1)
    parameters = [parameter for bias in biases for parameter in bias.parameters()]
    expected = [bias(height, width) for bias in biases]
    tables = tables_at_once(biases, height, width)
    assert len(tables) == len(biases)
    for table, value in zip(tables, expected):
        assert table.dtype == value.dtype
        torch.testing.assert_close(table, value, rtol=1e-6, atol=1e-6 * value.abs().max().item())
    gradients, of_each = (torch.autograd.grad(list(x), parameters, list(weights)) for x in (tables, expected))
    for gradient, value in zip(gradients, of_each):
        assert (gradient - value).norm() <= 2e-6 * value.norm()


@pytest.mark.parametrize('number', [1, 2, 5])
@pytest.mark.parametrize('at_once', [1, 2, 100])
@pytest.mark.parametrize('kind', KINDS)
def test_tables_of_some_blocks_at_once_are_those_of_each(monkeypatch, kind, at_once, number):
    monkeypatch.setattr(position_bias, 'HIDDEN_VALUES', at_once * 512 * 9 * 5)
    biases = drawn_biases(kind, number)
    if kind is ParameterizedPositionBias:
        for bias in biases:
            bias.set_window(5)
    assert_tables_of_each(biases)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('kind', KINDS[:2])
def test_tables_at_once_are_in_float32_or_wider_also_under_autocast(kind, dtype):
    biases = [bias.to(dtype) for bias in drawn_biases(kind)]
    with torch.autocast('cpu', torch.bfloat16):
        tables = tables_at_once(biases, 5, 3)
        for table, bias in zip(tables, biases):
            assert table.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(table, bias(5, 3), rtol=1e-6, atol=1e-6)


class DoubledBias(ContinuousPositionBias):
    def forward(self, height, width):
        return 2 * super().forward(height, width)


def double_by_hook(bias):
    bias.register_forward_hook(lambda module, args, table: 2 * table)


def add_by_hook(bias):
    bias[2].register_forward_hook(lambda module, args, out: out + 1)


DIFFERENCES = {
    'another kind': lambda bias: setattr(bias, '__class__', LinearContinuousPositionBias),
    'a subclass': lambda bias: setattr(bias, '__class__', DoubledBias),
    'another pretrained window': lambda bias: setattr(bias, 'pretrained_window', 9),
    'a hook': double_by_hook,
    'a hook on the MLP': add_by_hook,
    'another bias of the MLP': lambda bias: setattr(bias[0], 'bias', None),
}


@pytest.mark.parametrize('which', [0, 2])
@pytest.mark.parametrize('difference', DIFFERENCES)
def test_tables_of_blocks_that_differ_are_computed_one_by_one(difference, which):
    biases = drawn_biases(ContinuousPositionBias)
    alike = biases[which](5, 3)
    DIFFERENCES[difference](biases[which])
    assert (biases[which](5, 3) - alike).abs().max() > 0.01
    assert_tables_of_each(biases)
