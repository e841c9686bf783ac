"""Scaled cosine attention in ragged windows (Swin Transformer V2, arXiv 2111.09883, sections 3.2 and 3.3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arch import POSITION_BIASES
from .ops import attention
from .position_bias import KINDS, PositionBias
from .windows import Windows, gather, scatter

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
        self._bias_holder = POSITION_BIASES[position_bias]
        self.add_module(self._bias_holder, KINDS[position_bias](num_heads, pretrained_window))
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Attend inside each window.

        Args:
            x (Tensor): (B, H, W, C).
            windows (Windows): the partition of the (B, H, W) map.

        Returns:
            Tensor: (B, H, W, C).
        """
        tokens = gather(x, windows)  # (B*H*W, C)
        qkv = F.linear(tokens, self.qkv.weight, self._qkv_bias())
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (B*H*W, heads, d) each
        q, k = self._cosine(q, k)
        biases = self.position_bias([(group.height, group.width) for group in windows.groups])
        sizes = [group.num_tokens for group in windows.groups]
        dropout = self.attn_drop if self.training else 0.0
        outs = []
        for group, bias, *qkv_group in zip(windows.groups, biases, *(t.split(sizes) for t in (q, k, v))):
            q_group, k_group, v_group = (
                t.unflatten(0, (group.count, -1)).transpose(1, 2) for t in qkv_group
            )  # (windows, heads, N, d) each
            out = attention(q_group, k_group, v_group, bias, dropout)
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))  # (windows*N, C)
        tokens = self.proj_drop(self.proj(torch.cat(outs)))
        return scatter(tokens, windows, *x.shape[:3])

    @property
    def position_bias(self) -> PositionBias:
        """The module that gives the position bias."""
        return getattr(self, self._bias_holder)

    def _qkv_bias(self):
        if self.q_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def _cosine(self, q, k):
        """Unit queries times the logit scale, and unit keys, in float32 or wider: their product is the logit."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        scale = self.logit_scale.to(dtype).clamp(max=math.log(MAX_LOGIT_SCALE)).exp()  # (heads, 1, 1)
        return F.normalize(q.to(dtype), dim=-1) * scale.squeeze(-1), F.normalize(k.to(dtype), dim=-1)
