"""What several attention paths share: the layout of heads, and the bias of all pairs from a table of offsets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..position_bias import table_centre

NO_DROPOUT = 'cannot drop attention weights: unset it, or set attn_drop_rate=0'


def cosine(x: Tensor) -> Tensor:
    """Unit vectors in float32 or wider: their products are cosines."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def merge_heads(out: Tensor) -> Tensor:
    """``(windows, heads, N, d)`` to the tokens ``(windows*N, heads*d)``."""
    windows, heads, num_tokens, dims = out.shape
    return out.transpose(1, 2).reshape(windows * num_tokens, heads * dims)


def window_bias(table: Tensor, height: int, width: int) -> Tensor:
    """The bias of every (query, key) pair of a window, from a table of offsets.

    Args:
        table (Tensor): (heads, 2H-1, 2W-1), for windows up to H x W tokens; a smaller window uses its centre.
        height (int), width (int): window size in tokens.

    Returns:
        Tensor: (heads, h*w, h*w).
    """
    return reversed_window_bias(table, height, width).flip(2)


def reversed_window_bias(table: Tensor, height: int, width: int) -> Tensor:
    """`window_bias` with the keys last to first, which takes one copy and no index.

    An offset is the row of the query minus the row of the key. With keys counted from the end that becomes a sum, up to
    a constant. So the biases of a query are a rectangle of the table that begins at its own row and column: a view.
    """
    rectangles = table_centre(table, height, width).unfold(1, height, 1).unfold(2, width, 1)  # (heads, h, w, h, w)
    return rectangles.reshape(-1, height * width, height * width)


def fold_reversed_bias(grad: Tensor, height: int, width: int) -> Tensor:
    """The gradient of a table of offsets from that of its `reversed_window_bias`: sums over the pairs of each offset.

    Args:
        grad (Tensor): (heads, h*w, h*w).
        height (int), width (int): window size in tokens.

    Returns:
        Tensor: (heads, 2h-1, 2w-1).
    """
    grad = grad.view(-1, height, width, height, width)  # rows and columns of the query, then of the reversed key
    by_row = grad.new_zeros(grad.shape[0], 2 * height - 1, width, width)
    for row in range(height):
        by_row[:, row : row + height] += grad[:, row].transpose(1, 2)
    folded = grad.new_zeros(grad.shape[0], 2 * height - 1, 2 * width - 1)
    for column in range(width):
        folded[:, :, column : column + width] += by_row[:, :, column]
    return folded
