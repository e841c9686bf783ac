"""Triton kernels of a post-norm and its residual sum, ``x + scale * norm(branch)``, which `fused_block.py` launches.

A program takes `ROWS` tokens at a time with all their `C` channels; `BLOCK` is the power of two that holds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import cast

GENERAL = ['scale', 'tokens', 'per_image', 'eps']  # nothing is compiled anew for other values


@triton.jit
def _standardized(branch, places, is_channel, here, eps, C: tl.constexpr):
    """Rows with mean 0 and variance 1, and the inverse of their standard deviations."""
    b = tl.load(branch + places, here, 0.0).to(tl.float32)
    b = tl.where(is_channel[None, :], b - (tl.sum(b, 1) / C)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(b * b, 1) / C + eps)
    return b * inverse[:, None], inverse


@triton.jit(do_not_specialize=GENERAL)
def post_norm_kernel(
    x, branch, weight, bias, scale, out, half,
    tokens, per_image, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_HALF: tl.constexpr,
):  # fmt: skip
    """The sum, and a copy of it in another dtype. ``scale`` has one value per image."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    here = (row < tokens)[:, None] & (channel < C)[None, :]
    places = row[:, None] * C + channel[None, :]
    unit, _ = _standardized(branch, places, channel < C, here, eps, C)
    y = unit * tl.load(weight + channel, channel < C, 0.0).to(tl.float32)[None, :]
    y += tl.load(bias + channel, channel < C, 0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        y *= tl.load(scale + row // per_image, row < tokens, 0.0).to(tl.float32)[:, None]
    y += tl.load(x + places, here, 0.0).to(tl.float32)
    tl.store(out + places, cast(y, out.dtype.element_ty), here)
    if HAS_HALF:
        tl.store(half + places, cast(y, half.dtype.element_ty), here)


@triton.jit(do_not_specialize=GENERAL)
def post_norm_backward_kernel(
    grad, grad_half, branch, weight, scale, total, grad_branch, sums,
    tokens, per_image, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_HALF: tl.constexpr,
):  # fmt: skip
    """The gradient of ``branch``, that of ``x`` if it comes in two parts, and sums over some of the tokens.

    ``sums`` is (programs, 3, C): the gradients of the weight and the bias of the norm, and the sum of the gradients of
    ``branch``, which is that of the bias of the layer before.
    """
    channel = tl.arange(0, BLOCK)
    is_channel = channel < C
    w = tl.load(weight + channel, is_channel, 0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    of_branch = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < tokens)[:, None] & is_channel[None, :]
        places = row[:, None] * C + channel[None, :]
        g = tl.load(grad + places, here, 0.0).to(tl.float32)
        if HAS_HALF:
            g += tl.load(grad_half + places, here, 0.0).to(tl.float32)
            tl.store(total + places, cast(g, total.dtype.element_ty), here)
        if HAS_SCALE:
            g *= tl.load(scale + row // per_image, row < tokens, 0.0).to(tl.float32)[:, None]
        unit, inverse = _standardized(branch, places, is_channel, here, eps, C)
        of_weight += g * unit
        of_bias += g
        g *= w
        along = unit * (tl.sum(g * unit, 1) / C)[:, None]
        g = tl.where(here, (g - (tl.sum(g, 1) / C)[:, None] - along) * inverse[:, None], 0.0)
        of_branch += g
        tl.store(grad_branch + places, cast(g, grad_branch.dtype.element_ty), here)
    sums += tl.program_id(0) * (3 * C) + channel
    tl.store(sums, tl.sum(of_weight, 0), is_channel)
    tl.store(sums + C, tl.sum(of_bias, 0), is_channel)
    tl.store(sums + 2 * C, tl.sum(of_branch, 0), is_channel)
