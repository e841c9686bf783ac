"""Attention in graphs for maps of any size: padded windows of one size, whose padding a mask keeps from being a key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..windows import PaddedWindows
from .common import cosine, window_bias


def attention(qkv: Tensor, scale: Tensor, table: Tensor, windows: PaddedWindows, dropout: float = 0.0) -> Tensor:
    """As `reference.attention`, on whole maps, with operators that do not depend on the size of the map.

    A ragged window is a full one with tokens missing. Here they are padded, and take no part in the softmax, so the
    function is the same. Padded windows cost time and memory: a graph for one size does without them.

    Args:
        qkv (Tensor): (B, H, W, 3 * heads * d). H and W may be symbolic.
        scale (Tensor), table (Tensor), dropout (float): as in `reference.attention`.
        windows (PaddedWindows): the windows of the map.

    Returns:
        Tensor: (B, H, W, heads * d).
    """
    batch, height, width, channels = qkv.shape
    num_heads, num_places = table.shape[0], windows.window**2
    q, k, v = qkv.view(batch, height * width, 3, num_heads, channels // (3 * num_heads)).unbind(2)
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = (  # (B, windows, heads, N, d)
            x.index_select(1, windows.order).unflatten(1, (-1, num_places)).transpose(2, 3)
            for x in (cosine(q) * scale.view(num_heads, 1), cosine(k), v)
        )
        mask = torch.zeros_like(windows.is_token, dtype=k.dtype)
        mask = mask.masked_fill(~windows.is_token, torch.finfo(k.dtype).min).view(-1, 1, 1, num_places)
        logits = q @ k.mT + window_bias(table, windows.window, windows.window) + mask
        out = F.dropout(torch.softmax(logits, -1), dropout).to(v.dtype) @ v
    out = out.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, windows * N, C)
    return out.index_select(1, windows.places).view(batch, height, width, channels // 3)
