"""Scaled cosine attention in ragged windows (Swin Transformer V2, arXiv 2111.09883, sections 3.2 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ops import attention
from .ops.linear import apply_linear, linear
from .position_bias import POSITION_BIASES, PositionBias
from .shortcuts import is_plain
from .windows import WindowGroup

MAX_LOGIT_SCALE = 100.0


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows: ``softmax(cos(q, k) * scale + bias) v``.

    Follows `WindowAttention` of the official `models/swin_transformer_v2.py`: the scale is learned per head and
    limited to 100, the bias comes from a continuous position bias MLP by default, and the key has no bias.

    Args:
        embed_dims (int): channels C.
        num_heads (int): attention heads, a divisor of ``embed_dims``.
        pretrained_window (int): the window size in tokens that the position bias was, or will be, trained with.
        qkv_bias (bool): whether queries and values have a bias.
        attn_drop (float): dropout of attention weights.
        proj_drop (float): dropout of the output.
        position_bias (str): log_cpb, linear_cpb or parameterized; each has a name of its own in the state dict, so
            that weights of one never load as another.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        pretrained_window: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        position_bias: str = 'log_cpb',
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        bias = POSITION_BIASES[position_bias](num_heads, pretrained_window)
        self._bias_name = bias.name
        self.add_module(bias.name, bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, tokens: Tensor, groups: Sequence[WindowGroup], table: Tensor) -> Tensor:
        """Attend inside each window.

        Args:
            tokens (Tensor): (T, C), in window order.
            groups (Sequence[WindowGroup]): the windows that they are.
            table (Tensor): what ``position_bias`` gives for windows at least as large.

        Returns:
            Tensor: (T, C).
        """
        out = attention(self._qkv(tokens), self._scale(), table, groups, self.attn_drop if self.training else 0.0)
        return self.proj_drop(apply_linear(self.proj, out))

    @property
    def position_bias(self) -> PositionBias:
        """The module that gives the position bias."""
        return getattr(self, self._bias_name)

    def _qkv(self, tokens):
        """Queries, keys and values of tokens (T, C): (T, 3C)."""
        if self.q_bias is None:
            return apply_linear(self.qkv, tokens)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        if is_plain(self.qkv, nn.Linear) and self.qkv.bias is None:
            return linear(tokens, self.qkv.weight, bias)
        qkv = self.qkv(tokens)
        return qkv + bias.to(qkv.dtype)

    def _scale(self):
        """The factor of the cosines, (heads, 1, 1), in float32 or wider."""
        scale = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32))
        return scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
