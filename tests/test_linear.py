"""Linear layers against `torch.nn.functional.linear`, and what they keep for backward."""

import pytest
import torch
import torch.nn.functional as F
from across_versions import strict_zip
from torch import nn
from torch.profiler import ProfilerActivity, profile

from swinv2_mm import compat
from swinv2_mm.blocks import Mlp
from swinv2_mm.ops.linear import ONEDNN_ROWS, _linear_operator, apply_linear, apply_mlp, linear


def names_of_operators(function):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name for event in profiler.events()]


ONEDNN = 'mkldnn::_linear_pointwise'
needs_onednn = pytest.mark.skipif(not compat.HAS_ONEDNN_LINEAR, reason='PyTorch 2.0 computes linear layers by MKL')


@pytest.mark.parametrize('shape', [(ONEDNN_ROWS, 8), (2, ONEDNN_ROWS, 8), (3, ONEDNN_ROWS // 2, 2, 8)])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('before_gelu', [False, True])
def test_inference_by_onednn_is_the_linear_layer(shape, bias, before_gelu):
    x, weight = torch.randn(shape), torch.randn(6, 8)
    bias = torch.randn(6) if bias else None
    expected = F.linear(x, weight, bias)
    expected = F.gelu(expected) if before_gelu else expected
    torch.testing.assert_close(linear(x, weight, bias, before_gelu), expected, rtol=1e-5, atol=1e-5)
    names = names_of_operators(lambda: linear(x, weight, bias, before_gelu))
    assert names.count(ONEDNN) == compat.HAS_ONEDNN_LINEAR
    assert names.count('aten::gelu') == (before_gelu and not compat.HAS_ONEDNN_LINEAR)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='opcheck takes no tolerance')
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('before_gelu', [False, True])
def test_the_operator_is_what_a_compiler_is_told(bias, before_gelu):
    arguments = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6) if bias else None, before_gelu
    torch.library.opcheck(_linear_operator, arguments, rtol=1e-5, atol=1e-5)


class Quantised(torch.Tensor):
    """A tensor with behaviour of its own, as quantised weights are."""


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 graphs hold no operator of ours')
@pytest.mark.parametrize('kind, holds_operator', [(nn.Parameter, True), (lambda x: x.as_subclass(Quantised), False)])
def test_a_graph_for_inference_takes_plain_weights_alone_to_our_operator(kind, holds_operator):
    targets = []

    def keep(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with torch.no_grad():
        out = torch.compile(lambda x, weight: linear(x, weight), backend=keep, fullgraph=True)(x, kind(weight))
    torch.testing.assert_close(out.as_subclass(torch.Tensor), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert (torch.ops.swinv2_mm.linear.default in targets) == holds_operator


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('rows', [5, ONEDNN_ROWS])
def test_an_mlp_is_two_layers_with_gelu_between_them(frozen, rows):
    fc1, fc2, x = nn.Linear(8, 6), nn.Linear(6, 4), torch.randn(rows, 8)
    fc1.requires_grad_(not frozen)
    of = (*fc2.parameters(), *(() if frozen else fc1.parameters()))
    out, expected = apply_mlp(fc1, fc2, x), fc2(F.gelu(fc1(x)))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in strict_zip(
        torch.autograd.grad(out.square().sum(), of), torch.autograd.grad(expected.square().sum(), of)
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize('shape', [(8,), (37, 8), (3, 5, 8), (ONEDNN_ROWS, 8), (2, ONEDNN_ROWS, 8)])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('after_gelu', [False, True])
def test_training_by_onednn_has_the_gradients_of_the_linear_layer(shape, bias, after_gelu):
    layer, x = nn.Linear(8, 6, bias=bias), torch.randn(shape, requires_grad=True)
    of = (x, *layer.parameters())

    def derivatives(function):
        out = function()
        summed = torch.autograd.grad(out.sum(), of, retain_graph=True)  # of a gradient with strides of 0
        first = torch.autograd.grad(out.square().sum(), of, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), of)
        return out, *summed, *first, *second

    def plain():
        return F.linear(F.gelu(x) if after_gelu else x, layer.weight, layer.bias)

    def own():
        return apply_linear(layer, x, after_gelu=after_gelu)

    for actual, wanted in strict_zip(derivatives(own), derivatives(plain)):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    names = names_of_operators(lambda: own().sum().backward())
    recurs = x[..., 0].numel() % ONEDNN_ROWS == 0
    assert names.count(ONEDNN) == (2 if compat.HAS_ONEDNN_LINEAR and recurs else 0)  # the other for the gradient of x


@needs_onednn
@pytest.mark.parametrize('wanted', ['x', 'weight', 'bias'])
def test_training_computes_no_gradient_that_nothing_needs(wanted):
    tensors = {'x': torch.randn(ONEDNN_ROWS, 8), 'weight': torch.randn(6, 8), 'bias': torch.randn(6)}
    tensors[wanted].requires_grad_()
    names = names_of_operators(lambda: linear(**tensors).sum().backward())
    assert names.count(ONEDNN) == (2 if wanted == 'x' else 1)
    assert names.count('aten::mm') == (1 if wanted == 'weight' else 0)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [wanted]


def under_autocast():
    with torch.autocast('cpu', torch.bfloat16):
        assert linear(torch.randn(ONEDNN_ROWS, 8), torch.randn(6, 8)).dtype == torch.bfloat16


def in_float64():
    linear(torch.randn(ONEDNN_ROWS, 8).double(), torch.randn(6, 8).double())


def of_rows_that_seldom_recur():
    linear(torch.randn(ONEDNN_ROWS + 1, 8), torch.randn(6, 8))


@pytest.mark.parametrize('function', [under_autocast, in_float64, of_rows_that_seldom_recur])
def test_all_else_is_left_to_pytorch(function):
    assert ONEDNN not in names_of_operators(function)


def test_a_traced_graph_has_no_private_operator():
    weight = torch.randn(6, 8)
    traced = torch.jit.trace(lambda x: linear(x, weight), torch.randn(ONEDNN_ROWS, 8), check_trace=False)
    assert 'aten::linear' in str(traced.graph) and 'mkldnn' not in str(traced.graph)


def test_after_gelu_has_the_values_and_gradients_of_gelu_and_layer():
    layer, x = nn.Linear(7, 4).double(), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 4, dtype=torch.float64)
    of = (x, layer.weight, layer.bias)
    expected = nn.functional.linear(x * (1 + torch.erf(x / 2**0.5)) / 2, layer.weight, layer.bias)
    torch.testing.assert_close(apply_linear(layer, x, after_gelu=True), expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in strict_zip(
        torch.autograd.grad(apply_linear(layer, x, after_gelu=True), of, weights),
        torch.autograd.grad(expected, of, weights),
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    names = [name for name, _ in layer.named_parameters()]

    def after_gelu(x, *parameters):
        with torch.nn.utils.stateless._reparametrize_module(layer, dict(zip(names, parameters))):
            return apply_linear(layer, x, after_gelu=True)

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(after_gelu, (x, *parameters))
    assert torch.autograd.gradgradcheck(after_gelu, (x, *parameters))


def kept_for_backward(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(tuple(x.shape)), lambda _: None):
        function()
    return sizes


def test_after_gelu_keeps_one_tensor_of_tokens():
    layer, x = nn.Linear(7, 4), torch.randn(5, 7, requires_grad=True)
    assert kept_for_backward(lambda: apply_linear(layer, x, after_gelu=True)) == [(5, 7), (4, 7)]
    assert kept_for_backward(lambda: layer(F.gelu(x))).count((5, 7)) == 2


@pytest.mark.parametrize('shape', [(7,), (2, 3, 7)])
@pytest.mark.parametrize('bias', [False, True])
def test_after_gelu_takes_any_number_of_dimensions(shape, bias):
    layer, x = nn.Linear(7, 4, bias=bias).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    of = (x, *layer.parameters())
    out, expected = apply_linear(layer, x, after_gelu=True), layer(F.gelu(x))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in strict_zip(torch.autograd.grad(out.sum(), of), torch.autograd.grad(expected.sum(), of)):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@needs_onednn
def test_after_gelu_computes_no_gradient_of_frozen_weights():
    layer, x = nn.Linear(7, 4).requires_grad_(False), torch.randn(ONEDNN_ROWS, 7, requires_grad=True)
    names = names_of_operators(lambda: apply_linear(layer, x, after_gelu=True).sum().backward())
    assert (names.count(ONEDNN), names.count('aten::mm'), names.count('aten::gelu')) == (2, 0, 1)
    assert layer.weight.grad is None and x.grad.abs().max() > 0


def test_under_autocast_after_gelu_computes_in_bfloat16():
    mlp, x = Mlp(8, 32, drop=0.0), torch.randn(40, 8, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        out, expected = mlp(x), mlp.fc2(F.gelu(mlp.fc1(x)))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    of = (x, *mlp.parameters())
    for actual, wanted in zip(
        torch.autograd.grad(out, of, torch.ones_like(out)), torch.autograd.grad(expected, of, torch.ones_like(out))
    ):
        assert actual.dtype == torch.float32
        assert (actual - wanted).abs().max() <= 2**-6 * wanted.abs().max()


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, as low-rank adaptation puts in its place."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.adapter = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.adapter(x)


def test_a_layer_that_was_replaced_or_has_hooks_is_called():
    mlp, x = Mlp(8, 32, drop=0.0), torch.randn(5, 8)
    hidden, seen = F.gelu(mlp.fc1(x)), []
    hook = mlp.fc2.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    plain = mlp(x)
    hook.remove()
    torch.testing.assert_close(seen, [hidden])
    mlp.fc2 = Adapted(mlp.fc2)
    torch.testing.assert_close(mlp(x), plain + mlp.fc2.adapter(hidden))
