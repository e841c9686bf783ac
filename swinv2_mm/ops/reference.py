"""Attention of one group of windows as the equation says it: the specification of every other path."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """``softmax(q k^T + bias) v`` inside each window; logits and softmax in the dtype of ``q``, under any autocast.

    Args:
        q (Tensor), k (Tensor): (windows, heads, N, d), float32 or wider; unit vectors, ``q`` times the logit scale.
        v (Tensor): (windows, heads, N, d), in the dtype to compute in.
        bias (Tensor): (1, heads, N, N), in the dtype of ``q``.
        dropout (float): probability of dropping an attention weight.

    Returns:
        Tensor: (windows, heads, N, d) in the dtype of ``v``.
    """
    with torch.autocast(q.device.type, enabled=False):
        weights = torch.softmax(q @ k.transpose(-2, -1) + bias, dim=-1)
        return F.dropout(weights, dropout).to(v.dtype) @ v
