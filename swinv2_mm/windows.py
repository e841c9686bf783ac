"""Ragged windows: cut the feature map into windows that fit it, instead of padding the map to fit the windows.

The cyclic shift, the zero padding and the attention mask of Swin (arXiv 2103.14030, section 3.2) exist only to make
every window the same size. Cutting each axis into segments of unequal size gives the same windows without them.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class WindowGroup(NamedTuple):
    """All windows of one size in a batch: ``count`` windows of ``height`` x ``width`` tokens."""

    height: int
    width: int
    count: int

    @property
    def num_tokens(self) -> int:
        return self.height * self.width * self.count


class Windows(NamedTuple):
    """A partition of a ``(B, H, W)`` map into windows, group after group.

    Attributes:
        groups (tuple[WindowGroup]): at most nine, in the order of ``order``.
        order (Tensor): (B*H*W,) int64, the flat map index of the token at each place in window order.
        inverse (Tensor): (B*H*W,) int64, the place in window order of the token at each flat map index.
    """

    groups: tuple[WindowGroup, ...]
    order: Tensor
    inverse: Tensor


def axis_segments(length: int, window: int, shift: int) -> dict[int, list[int]]:
    """Cut an axis into segments and collect those of equal size.

    An axis that fits into one window is one segment and is never shifted (``models/swin_transformer_v2.py`` of the
    official code, applied per axis). Otherwise: one segment of ``shift``, segments of ``window``, and the rest.

    Args:
        length (int): tokens along the axis.
        window (int): window size in tokens.
        shift (int): offset of the window grid in tokens, ``0 <= shift < window``.

    Returns:
        dict[int, list[int]]: the start of every segment by segment size; at most three sizes.
    """
    if length <= window:
        return {length: [0]}
    cuts = [0, *range(shift or window, length, window), length]
    starts_by_size = {}
    for start, end in pairwise(cuts):
        starts_by_size.setdefault(end - start, []).append(start)
    return starts_by_size


def partition(batch: int, height: int, width: int, window: int, shift: int, device=None) -> Windows:
    """Partition a ``(batch, height, width)`` map into ragged windows: the product of its row and column segments.

    Args:
        batch (int), height (int), width (int): the map's shape in tokens.
        window (int): window size in tokens.
        shift (int): offset of the window grid in tokens, 0 in even blocks and ``window // 2`` in odd blocks.
        device (torch.device, optional): where the index tensors live.
    """

    def places(starts, size):
        return torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)  # (count, size)

    images = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1)
    groups, orders = [], []
    for h, row_starts in axis_segments(height, window, shift).items():
        rows = places(row_starts, h)[:, None, :, None]
        for w, column_starts in axis_segments(width, window, shift).items():
            columns = places(column_starts, w)[:, None, :]
            orders.append(((images * height + rows) * width + columns).flatten())  # (B, rows, columns, h, w) flat
            groups.append(WindowGroup(h, w, batch * len(row_starts) * len(column_starts)))
    order = torch.cat(orders)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
    return Windows(tuple(groups), order, inverse)


def gather(x: Tensor, windows: Windows) -> Tensor:
    """Put the tokens of a map ``(B, H, W, C)`` into window order, ``(B*H*W, C)``."""
    return _Permute.apply(x.flatten(0, 2), windows.order, windows.inverse)


def scatter(tokens: Tensor, windows: Windows, batch: int, height: int, width: int) -> Tensor:
    """Put tokens in window order ``(B*H*W, C)`` back onto their map ``(B, H, W, C)``: the inverse of `gather`."""
    return _Permute.apply(tokens, windows.inverse, windows.order).view(batch, height, width, -1)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient is the inverse permutation, where `index_select` would add row by row."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None
