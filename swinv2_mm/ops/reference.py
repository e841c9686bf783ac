"""Attention inside windows as the equation says it: the specification of every other path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..position_bias import window_bias
from ..windows import WindowGroup


def attention(qkv: Tensor, scale: Tensor, table: Tensor, groups: Sequence[WindowGroup], dropout: float = 0.0) -> Tensor:
    """``softmax(cos(q, k) * scale + bias) v`` inside each window (sections 3.2 and 3.3).

    Cosines, logits and softmax are in float32 or wider, under any autocast.

    Args:
        qkv (Tensor): (T, 3 * heads * d), queries, keys and values of the tokens in window order.
        scale (Tensor): (heads, 1, 1), in float32 or wider.
        table (Tensor): (heads, 2H-1, 2W-1), the position bias of every offset, in float32 or wider.
        groups (Sequence[WindowGroup]): the windows; none exceeds H x W tokens.
        dropout (float): probability of dropping an attention weight.

    Returns:
        Tensor: (T, heads * d) in the dtype of ``qkv``.
    """
    outs = []
    with torch.autocast(qkv.device.type, enabled=False):
        for group, tokens in zip(groups, qkv.split([group.num_tokens for group in groups])):
            q, k, v = split_heads(tokens, group, table.shape[0])
            bias = window_bias(table, group.height, group.width)
            weights = torch.softmax(cosine(q) * scale @ cosine(k).transpose(-2, -1) + bias, dim=-1)
            outs.append(merge_heads(F.dropout(weights, dropout).to(v.dtype) @ v))
    return torch.cat(outs)


def split_heads(qkv: Tensor, group: WindowGroup, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (windows, heads, N, d) each, of the tokens (T, 3 * heads * d) of one group."""
    dims = qkv.shape[1] // (3 * num_heads)
    qkv = qkv.view(group.count, group.height * group.width, 3, num_heads, dims)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(out: Tensor) -> Tensor:
    """``(windows, heads, N, d)`` to the tokens ``(windows*N, heads*d)``."""
    windows, heads, num_tokens, dims = out.shape
    return out.transpose(1, 2).reshape(windows * num_tokens, heads * dims)


def cosine(x: Tensor) -> Tensor:
    """Unit vectors in float32 or wider: their products are cosines."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
