"""Attention inside windows through ``scaled_dot_product_attention``, which keeps no N x N tensor of every window."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compat
from ..shortcuts import is_transforming
from ..windows import WindowGroup
from .common import NO_DROPOUT, cosine, merge_heads, window_bias

ORDER = 'window'
ALIGNMENT = 8  # elements; rows of a bias that start elsewhere make the memory-efficient kernel copy it, or refuse it


def attention(qkv: Tensor, scale: Tensor, table: Tensor, groups: Sequence[WindowGroup], dropout: float = 0.0) -> Tensor:
    """As `reference.attention` without dropout; agrees with it to the rounding of the dtype of ``qkv``.

    The kernels accumulate logits and softmax in float32, but round their operands, the bias included, to the dtype of
    ``qkv``. On CUDA the kernel with a gradient of the bias writes one for every window, and then sums them.
    """
    outs = []
    on_cuda = _on_cuda(qkv)
    num_heads = table.shape[0]
    with torch.autocast(qkv.device.type, enabled=False), compat.kernels_with_bias() if on_cuda else nullcontext():
        q, k, v = qkv.view(qkv.shape[0], 3, num_heads, qkv.shape[1] // (3 * num_heads)).unbind(1)  # (T, heads, d)
        q, k = (cosine(q) * scale.view(num_heads, 1)).to(v.dtype), cosine(k).to(v.dtype)
        sizes = [group.num_tokens for group in groups]
        for group, *tokens in zip(groups, *(x.split(sizes) for x in (q, k, v))):
            windows = (group.count, group.height * group.width)
            operands = (x.view(*windows, *x.shape[1:]).transpose(1, 2) for x in tokens)  # (windows, heads, N, d)
            bias = window_bias(table, group.height, group.width).to(v.dtype)
            bias = (_aligned(bias) if on_cuda else bias)[None]  # on CPU a bias of three dimensions takes the slow path
            out = compat.attention_with_bias(*operands, bias)
            if compat.is_exporting():  # the operators that an exporter puts in place of attention give other strides
                out = out.clone(memory_format=torch.contiguous_format)
            outs.append(merge_heads(out))
    return torch.cat(outs)


def unable(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> str | None:
    """Why this path can't serve a call, or None."""
    return NO_DROPOUT if dropout > 0 else None


def is_worthwhile(needs_grad: bool) -> bool:
    """Whether to take this path where it can serve. The kernels lack derivatives of some kinds."""
    return not is_transforming()


def _on_cuda(x):
    return x.device.type == 'cuda'


def _aligned(bias):
    """The same (heads, N, N), with rows that start at multiples of `ALIGNMENT` elements in memory."""
    num_keys = bias.shape[-1]
    if num_keys % ALIGNMENT == 0:
        return bias
    return F.pad(bias, (0, -num_keys % ALIGNMENT))[..., :num_keys]
