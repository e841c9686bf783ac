"""How the attention of one group of equal windows is computed."""

from torch import Tensor

from . import reference, sdpa


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """`reference.attention` by the fastest path that has what the call needs.

    The fused kernels give no gradient to the bias on CPU, so a bias under training goes through the formula.
    """
    if bias.requires_grad or dropout > 0:
        return reference.attention(q, k, v, bias, dropout)
    return sdpa.attention(q, k, v, bias)
