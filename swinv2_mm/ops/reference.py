"""Attention inside windows as the paper's equation says it: the specification of every faster path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..windows import WindowGroup

ORDER = 'window'


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
            q, k, v = _split_heads(tokens, group, table.shape[0])  # (windows, heads, N, d)
            logits = _unit(q) * scale @ _unit(k).transpose(-2, -1) + _bias(table, group.height, group.width)
            weights = F.dropout(torch.softmax(logits, dim=-1), dropout)  # (windows, heads, N, N)
            out = weights.to(v.dtype) @ v
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))  # (windows*N, heads*d)
    return torch.cat(outs)


def unable(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> None:
    """Why this path can't serve a call: None, because it always can."""


def is_worthwhile(needs_grad: bool) -> bool:
    """Whether to take this path where it can serve: always, as the last one."""
    return True


def _split_heads(qkv, group, num_heads):
    qkv = qkv.view(group.count, group.height * group.width, 3, num_heads, qkv.shape[1] // (3 * num_heads))
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _unit(x):
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _bias(table, height, width):
    """(heads, N, N): the entry of each (query, key) pair at its offset, query minus key."""
    rows = torch.arange(height, device=table.device).repeat_interleave(width)  # (N,)
    columns = torch.arange(width, device=table.device).repeat(height)
    centre_row, centre_column = (side // 2 for side in table.shape[1:])
    return table[:, rows[:, None] - rows + centre_row, columns[:, None] - columns + centre_column]
