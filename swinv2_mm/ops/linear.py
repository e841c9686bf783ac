"""Linear layers of tokens: what `torch.nn.functional.linear` gives, in less time or memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .. import compat
from ..shortcuts import PLAIN, is_plain, is_recorded, is_traced, may_use_functions, may_use_operators_in_graph

ONEDNN_ROWS = 256  # most parts of a map are whole windows with a multiple of it


def apply_linear(layer: nn.Module, x: Tensor, bias: Tensor | None = None, after_gelu: bool = False) -> Tensor:
    """``layer(x)``, through `linear` where the layer is a plain `nn.Linear`.

    Any other module in its place (an adapter, a quantised layer, one with hooks) is called.

    Args:
        layer (nn.Module): a linear layer, or what replaces it.
        x (Tensor): (..., in_features).
        bias (Tensor, optional): (out_features,), added to what the layer gives.
        after_gelu (bool): whether the layer takes the GELU of ``x``, which backward recomputes instead of keeping it.
    """
    if not is_plain(layer, nn.Linear) or not (bias is None or layer.bias is None):
        out = layer(F.gelu(x) if after_gelu else x)
        return out if bias is None else out + bias.to(out.dtype)
    weight, bias = layer.weight, layer.bias if bias is None else bias
    if after_gelu and torch.is_grad_enabled() and not is_traced() and type(weight) in (*PLAIN, FakeTensor):
        return _Linear.apply(x, weight, bias, True)
    return linear(F.gelu(x) if after_gelu else x, weight, bias)


def apply_mlp(fc1: nn.Module, fc2: nn.Module, x: Tensor) -> Tensor:
    """``fc2(gelu(fc1(x)))``, with each layer as in `apply_linear`."""
    if is_plain(fc1, nn.Linear) and may_use_functions() and not _needs_grad(x, fc1.weight, fc1.bias):
        return apply_linear(fc2, linear(x, fc1.weight, fc1.bias, before_gelu=True))
    return apply_linear(fc2, apply_linear(fc1, x), after_gelu=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, before_gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, through oneDNN in float32 on CPU: forward, and for the gradient of ``x``.

    PyTorch itself copies the bias over the output and calls MKL, which takes about 1.2 times as long on the machine
    that docs/performance.md names. Inductor does the same by itself, so a graph for inference gets this function as one
    operator. oneDNN allocates memory for every number of rows that it meets and never frees it. So it only gets numbers
    that recur from image to image: multiples of `ONEDNN_ROWS`.

    Args:
        x (Tensor), weight (Tensor), bias (Tensor, optional): as `torch.nn.functional.linear` takes them.
        before_gelu (bool): whether to return the GELU of the result. Only where no gradient is needed.
    """
    needs_grad = _needs_grad(x, weight, bias)
    if not needs_grad and _suits_operator(x, weight, bias):
        return _linear_operator(x, weight, bias, before_gelu)
    if not _suits_onednn(x, weight, bias):
        out = F.linear(x, weight, bias)
        return F.gelu(out) if before_gelu else out
    if needs_grad:
        return _Linear.apply(x, weight, bias, False)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu' if before_gelu else 'none', [], 'none')


@compat.custom_op('swinv2_mm::linear', '(Tensor x, Tensor weight, Tensor? bias, bool before_gelu) -> Tensor')
def _linear_operator(x, weight, bias, before_gelu):
    return linear(x, weight, bias, before_gelu)


@_linear_operator.register_fake
def _(x, weight, bias, before_gelu):
    return x.new_empty(*x.shape[:-1], len(weight))


def _needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _suits_operator(*tensors):
    if not compat.is_compiling() or not may_use_operators_in_graph() or compat.is_autocast_on_cpu():
        return False
    return _are_plain(*tensors)


def _suits_onednn(*tensors):
    if is_recorded() or compat.is_autocast_on_cpu() or not compat.HAS_ONEDNN_LINEAR:
        return False
    if tensors[0].shape[:-1].numel() % ONEDNN_ROWS:
        return False
    if not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    return _are_plain(*tensors)


def _are_plain(*tensors):
    given = [t for t in tensors if t is not None]
    return all(type(t) in PLAIN and t.dtype == torch.float32 and t.device.type == 'cpu' for t in given)


class _Linear(torch.autograd.Function):
    """A linear layer of ``x``, or of its GELU, which backward recomputes.

    Under autocast all but the gradients of weight and bias are in the half precision of the output.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, after_gelu):
        ctx.save_for_backward(x, weight)
        ctx.after_gelu = after_gelu
        with compat.without_cast_cache():
            return linear(F.gelu(x) if after_gelu else x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_x:
            grad_x = linear(grad, weight.mT.to(grad.dtype)).to(x.dtype)
            if ctx.after_gelu:
                grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        if needs_weight:
            inputs = (F.gelu(x) if ctx.after_gelu else x).to(grad.dtype)
            grad_weight = (rows.mT @ inputs.reshape(-1, x.shape[-1])).to(weight.dtype)
        if needs_bias:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None
