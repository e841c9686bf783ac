"""What stands in for newer versions of PyTorch has the values and gradients of what it stands in for."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from swinv2_mm import compat, ops
from swinv2_mm.windows import WindowGroup


def test_a_pytorch_that_is_too_old_is_refused_in_one_line_that_names_it():
    code = "import torch; del torch.compile; torch.__version__ = '1.13.1'; import swinv2_mm"
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    message = 'ImportError: swinv2_mm needs PyTorch 2.0 or later, and this environment has 1.13.1: install it with the '
    assert run.stderr.split('\n')[-2].startswith(message)


@pytest.mark.parametrize(
    'version, is_enough', [('2.6.1', False), ('2.7.0a0+nv', False), ('2.7.0+cu126', True), ('3.0', True)]
)
def test_what_a_newer_pytorch_is_needed_for_is_one_line(monkeypatch, version, is_enough):
    monkeypatch.setattr(torch, '__version__', TorchVersion(version))
    if is_enough:
        compat.require((2, 7), 'the export')
    else:
        message = f'^the export needs PyTorch 2\\.7 or later, and this environment has {version}$'.replace('+', r'\+')
        with pytest.raises(ValueError, match=message):
            compat.require((2, 7), 'the export')


@pytest.mark.parametrize('version', [(2, 1), (2, 3), (2, 4), (2, 5), (2, 7)])
def test_the_kept_version_compares_like_that_of_pytorch(version):
    assert (compat.torch_version >= version) == (torch.__version__ >= version)


def operands(dtype, windows=3, heads=2, num_tokens=7, width=8):
    q, k, v = (torch.randn(windows, heads, num_tokens, width, dtype=torch.float64).to(dtype) for _ in range(3))
    bias = 16 * torch.rand(1, heads, num_tokens, num_tokens, dtype=torch.float64).to(dtype)
    return 5 * q, k, v, bias


def formula(q, k, v, bias):
    logits = torch.einsum('whqd,whkd->whqk', q, k) + bias
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.einsum('whqk,whkd->whqd', weights / weights.sum(-1, keepdim=True), v)


LAYOUTS = {
    'dense': lambda bias: bias,
    'transposed': lambda bias: bias.mT.contiguous().mT,
    'every other': lambda bias: torch.stack((bias, -bias), -1).flatten(-2)[..., ::2],
    'overlapping': lambda bias: bias[:, :, :1, :1].expand_as(bias),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('attend', [compat.attention_with_bias, compat.flash_attention_on_cpu])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_is_the_formula_whatever_the_strides_of_the_bias(layout, attend, dtype, tolerance):
    """PyTorch 2.7 read wrong elements of a bias whose last stride is not 1."""
    q, k, v, bias = operands(dtype)
    bias = LAYOUTS[layout](bias)
    expected = formula(*(x.double() for x in (q, k, v, bias)))
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('gradients', [False, True])
def test_logits_are_not_rounded_to_half_precision(dtype, gradients):
    q, k, v, bias = (x.requires_grad_(gradients) for x in operands(dtype))
    with torch.no_grad():
        q.mul_(20)  # logits of hundreds, which bfloat16 rounds to whole numbers
    expected = formula(*(x.detach().double() for x in (q, k, v, bias)))
    actual = compat.attention_with_bias(q, k, v, bias)
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max() + 1e-4


@pytest.mark.skipif(torch.__version__ < (2, 1), reason='there is nothing but the formula')
def test_the_formula_of_older_versions_has_the_values_and_gradients_of_the_kernels(monkeypatch):
    leaves = [x.requires_grad_() for x in operands(torch.float64)]
    results = []
    for first in ((2, 0), (99, 0)):
        monkeypatch.setitem(compat.ACCURATE_WITH_BIAS, 'cpu', first)
        out = compat.attention_with_bias(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for kernel, plain in zip(*results):
        torch.testing.assert_close(kernel, plain, rtol=0, atol=1e-11)


def test_the_stand_in_for_a_custom_operator_has_its_values_and_gradients(monkeypatch):
    monkeypatch.setattr(compat, 'HAS_CUSTOM_OP', False)
    forward, backward = (
        getattr(operator, '_init_fn', None) or operator._function
        for operator in (ops.flash_cpu.window_attention, ops.flash_cpu.window_attention_backward)
    )
    own = compat.custom_op('swinv2_mm::stand_in', '(Tensor x) -> Tensor')(forward)
    own_backward = compat.custom_op('swinv2_mm::stand_in_backward', '(Tensor x) -> Tensor')(backward)
    own.register_fake(None)
    own.register_autograd(ops.flash_cpu._backward, setup_context=ops.flash_cpu._save_for_backward)
    own_backward.register_autograd(ops.flash_cpu._second_backward)
    monkeypatch.setattr(ops.flash_cpu, 'window_attention_backward', own_backward)
    qkv, scale = torch.randn(18, 3 * 2 * 4, dtype=torch.float64), torch.rand(2, 1, 1, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (qkv, scale, torch.rand(2, 5, 5, dtype=torch.float64))]
    groups = [WindowGroup(3, 3, 2)]
    out, expected = own(*leaves, [3, 3, 2]), ops.reference.attention(*leaves, groups)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(out)
    grads, expected_grads = (torch.autograd.grad(x, leaves, weights) for x in (out, expected))
    for actual, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)
    (grad,) = torch.autograd.grad(own(*leaves, [3, 3, 2]).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match='set SWINV2_MM_ATTENTION=reference'):
        grad.sum().backward()


def test_a_weight_keeps_its_gradient_after_a_cast_without_one():
    """Up to PyTorch 2.8 autocast takes up the cast that it made without gradients."""
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    with torch.autocast('cpu', torch.bfloat16):
        with torch.no_grad(), compat.without_cast_cache():
            layer(x)
        layer(x).float().sum().backward()
        assert torch.is_autocast_cache_enabled()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, 4), rtol=0.02, atol=0.02)


def test_an_mmengine_that_is_too_old_is_refused_in_one_line_that_names_it():
    code = "import mmengine; mmengine.__version__ = '0.7.4'; import swinv2_mm"
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    message = 'ImportError: swinv2_mm needs mmengine 0.8 or later, as mmdet 3 and mmseg 1 do, and this '
    assert run.stderr.split('\n')[-2].startswith(f'{message}environment has 0.7.4: ')
