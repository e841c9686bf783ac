"""The two residual branches of a block on CUDA, each a function with a backward pass of its own.

They compute what `Block` composes from layers, in fewer and larger steps. The sum of a branch is one kernel with its
norm, stochastic depth and the copy that the next product needs, and so is its gradient, with those of the norm and of
the bias before it. All weights of a branch are cast by one kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import compat
from .flash_cuda import map_attention, map_attention_backward, on_device_of

VALUES = 2048  # that a program of the post-norm holds at once
PROGRAMS = 512  # at most, that sum up the gradients of norms


class Parameters(NamedTuple):
    """The parameters of a branch: two linear layers and the norm after them. Biases of the layers may be None."""

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float

    @classmethod
    def of(cls, layer1: nn.Linear, bias1: Tensor | None, layer2: nn.Linear, norm: nn.LayerNorm) -> Parameters:
        """Those of some layers, with a bias of the first layer that may not be its own."""
        return cls(layer1.weight, bias1, layer2.weight, layer2.bias, norm.weight, norm.bias, norm.eps)


def attention_branch(
    x: Tensor,
    half: Tensor,
    parameters: Parameters,
    drop_scale: Tensor | None,
    scale: Tensor,
    table: Tensor,
    window: int,
    shift: int,
) -> tuple[Tensor, Tensor]:
    """``x + drop_scale * norm(proj(attention(qkv(x))))``.

    Args:
        x (Tensor): (B, H, W, C), the residual stream.
        half (Tensor): the same in the dtype of products, which may be that of ``x``.
        parameters (Parameters): ``weight1`` is (3C, C), ``weight2`` (C, C).
        drop_scale (Tensor, optional): (B, 1), as stochastic depth draws it.
        scale (Tensor), table (Tensor): as in `reference.attention`.
        window (int), shift (int): as in `windows.partition`.

    Returns:
        tuple[Tensor, Tensor]: the sum, and the same in the dtype of products.
    """
    x, half = _AttentionBranch.apply(x, half, *parameters, drop_scale, scale, table, window, shift)
    return x, x if half is None else half


def mlp_branch(x: Tensor, half: Tensor, parameters: Parameters, drop_scale: Tensor | None) -> Tensor:
    """``x + drop_scale * norm(fc2(gelu(fc1(x))))``, with arguments as in `attention_branch`."""
    return _MlpBranch.apply(x, half, *parameters, drop_scale)


class _AttentionBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, half, w1, b1, w2, b2, norm_weight, norm_bias, eps, drop_scale, scale, table, window, shift):
        ctx.set_materialize_grads(False)
        ctx.settings = eps, window, shift
        ctx.dtypes = w1.dtype, w2.dtype
        w1, b1, w2, b2 = _cast([w1, b1, w2, b2], [half.dtype] * 4)
        qkv = F.linear(half, w1, b1)
        attended, sums = map_attention(qkv, scale, table, window, shift)
        branch = F.linear(attended, w2, b2)
        ctx.save_for_backward(half, w1, w2, norm_weight, drop_scale, scale, table, qkv, attended, sums, branch)
        x, next_half = post_norm(x, branch, norm_weight, norm_bias, drop_scale, eps, half.dtype)
        return x, next_half if half.dtype != x.dtype else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_half):
        half, w1, w2, norm_weight, drop_scale, scale, table, qkv, attended, sums, branch = ctx.saved_tensors
        eps, window, shift = ctx.settings
        of_x, grad, *of_norm, of_b2 = _post_norm_gradients(ctx, grad, grad_half, branch, norm_weight, drop_scale, eps)
        of_w2 = _weight_gradient(grad, attended) if ctx.needs_input_grad[4] else None
        grad = grad @ w2
        grad, of_scale, of_table = map_attention_backward(grad, qkv, scale, table, attended, sums, window, shift)
        of_w1 = _weight_gradient(grad, half) if ctx.needs_input_grad[2] else None
        of_b1 = _sum(grad) if ctx.needs_input_grad[3] else None
        of_half = grad @ w1 if ctx.needs_input_grad[1] else None
        of_w1, of_w2 = _cast([of_w1, of_w2], ctx.dtypes)
        return of_x, of_half, of_w1, of_b1, of_w2, of_b2, *of_norm, None, None, of_scale, of_table, None, None


class _MlpBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, half, w1, b1, w2, b2, norm_weight, norm_bias, eps, drop_scale):
        ctx.eps = eps
        ctx.dtypes = w1.dtype, w2.dtype
        w1, b1, w2, b2 = _cast([w1, b1, w2, b2], [half.dtype] * 4)
        hidden = F.linear(half, w1, b1)
        branch = F.linear(F.gelu(hidden), w2, b2)
        ctx.save_for_backward(half, w1, w2, norm_weight, drop_scale, hidden, branch)
        return post_norm(x, branch, norm_weight, norm_bias, drop_scale, eps, x.dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        half, w1, w2, norm_weight, drop_scale, hidden, branch = ctx.saved_tensors
        of_x, grad, *of_norm, of_b2 = _post_norm_gradients(ctx, grad, None, branch, norm_weight, drop_scale, ctx.eps)
        of_w2 = _weight_gradient(grad, F.gelu(hidden)) if ctx.needs_input_grad[4] else None  # GELU is not kept
        grad = torch.ops.aten.gelu_backward(grad @ w2, hidden)
        of_w1 = _weight_gradient(grad, half) if ctx.needs_input_grad[2] else None
        of_b1 = _sum(grad) if ctx.needs_input_grad[3] else None
        of_half = grad @ w1 if ctx.needs_input_grad[1] else None
        of_w1, of_w2 = _cast([of_w1, of_w2], ctx.dtypes)
        return of_x, of_half, of_w1, of_b1, of_w2, of_b2, *of_norm, None, None


def _cast(tensors, dtypes):
    """The tensors in other dtypes, where they have not those, by one kernel for all; None stays."""
    cast = {
        i: torch.empty_like(x, dtype=dtype)
        for i, (x, dtype) in enumerate(zip(tensors, dtypes))
        if x is not None and x.dtype != dtype
    }
    if cast:
        torch._foreach_copy_(list(cast.values()), [tensors[i] for i in cast])
    return [cast.get(i, x) for i, x in enumerate(tensors)]


def _weight_gradient(grad, x):
    return grad.flatten(0, -2).mT @ x.flatten(0, -2)


def _sum(grad):
    return grad.flatten(0, -2).sum(0, dtype=torch.float32)


def _post_norm_gradients(ctx, grad, grad_half, branch, norm_weight, drop_scale, eps):
    """The gradients of x, the branch, the norm's weight and bias, and the bias of the layer before, if there is one."""
    total, grad_branch, sums = post_norm_backward(grad, grad_half, branch, norm_weight, drop_scale, eps)
    of_norm_weight, of_norm_bias, of_b2 = sums.sum(0)
    of_b2 = of_b2 if ctx.needs_input_grad[5] else None
    return grad if grad_half is None else total, grad_branch, of_norm_weight, of_norm_bias, of_b2


def _fake_post_norm(x, branch, weight, bias, scale, eps, half):
    return x.new_empty(x.shape), x.new_empty(x.shape if half != x.dtype else 0, dtype=half)


@compat.operator(
    'swinv2_mm::post_norm',
    '(Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? scale, float eps, ScalarType half) '
    '-> (Tensor, Tensor)',
    _fake_post_norm,
)
def post_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float, half: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``x + scale * layer_norm(branch)``, and a copy of it in another dtype, or no values if that is its own.

    Args:
        x (Tensor), branch (Tensor): (B, ..., C).
        weight (Tensor), bias (Tensor): (C,), of the norm.
        scale (Tensor, optional): one value per image.
    """
    from .post_norm_kernels import post_norm_kernel

    out, copy = _fake_post_norm(x, branch, weight, bias, scale, eps, half)
    tokens, compiled = _compiled(x, scale, half != x.dtype)
    with on_device_of(x):
        post_norm_kernel[(-(-tokens // compiled['ROWS']),)](
            x.contiguous(), branch.contiguous(), weight, bias, x if scale is None else scale.contiguous(), out, copy,
            tokens, tokens // max(len(x), 1), eps, **compiled,
        )  # fmt: skip
    return out, copy


def _fake_post_norm_backward(grad, grad_half, branch, weight, scale, eps):
    tokens, compiled = _compiled(grad, scale, grad_half is not None)
    programs = min(-(-tokens // compiled['ROWS']), PROGRAMS)
    total = grad.new_empty(0 if grad_half is None else grad.shape)
    sums = grad.new_empty(programs, 3, grad.shape[-1], dtype=torch.float32)
    return total, branch.new_empty(branch.shape), sums


@compat.operator(
    'swinv2_mm::post_norm_backward',
    '(Tensor grad, Tensor? grad_half, Tensor branch, Tensor weight, Tensor? scale, float eps) '
    '-> (Tensor, Tensor, Tensor)',
    _fake_post_norm_backward,
)
def post_norm_backward(
    grad: Tensor, grad_half: Tensor | None, branch: Tensor, weight: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, from those of both outputs of `post_norm`.

    Returns:
        tuple: the gradient of ``x`` if both are given, else no values; that of ``branch``; and (programs, 3, C), whose
        sums are those of ``weight``, ``bias``, and of what is added to all tokens of ``branch``.
    """
    from .post_norm_kernels import post_norm_backward_kernel

    total, grad_branch, sums = _fake_post_norm_backward(grad, grad_half, branch, weight, scale, eps)
    tokens, compiled = _compiled(grad, scale, grad_half is not None)
    with on_device_of(grad):
        grad = grad.contiguous()
        post_norm_backward_kernel[(len(sums),)](
            grad, grad if grad_half is None else grad_half.contiguous(), branch.contiguous(), weight,
            grad if scale is None else scale.contiguous(), total, grad_branch, sums,
            tokens, tokens // max(len(grad), 1), eps, **compiled,
        )  # fmt: skip
    return total, grad_branch, sums


def _compiled(x, scale, has_half):
    """The tokens of x, and how to compile a kernel for them."""
    channels = x.shape[-1]
    block = 1 << (channels - 1).bit_length()
    options = dict(
        C=channels, BLOCK=block, ROWS=max(VALUES // block, 1), HAS_SCALE=scale is not None, HAS_HALF=has_half
    )
    return x.shape[:-1].numel(), dict(options, num_warps=min(max(block // 512, 4), 32), enable_fp_fusion=True)
