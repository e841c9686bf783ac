"""Attention of one group of windows through PyTorch's fused kernels, which keep no N x N tensor."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`reference.attention` by ``scaled_dot_product_attention``.

    The kernels accumulate logits and softmax in float32 whatever the dtype of their operands. The bias goes in as
    ``(1, heads, N, N)`` and in the dtype of ``v``: on CPU a 3-D bias falls to the slow path, on CUDA some versions
    give wrong results for a float32 bias beside bfloat16 queries.

    Args and returns as `reference.attention`; agrees with it to the rounding of the dtype of ``v``.
    """
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=bias.to(v.dtype), scale=1.0)
