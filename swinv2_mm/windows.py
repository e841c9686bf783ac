"""Ragged windows: cut the feature map into windows that fit it, instead of padding the map to fit the windows.

The cyclic shift, the zero padding and the attention mask of Swin (arXiv 2103.14030, section 3.2) exist only to make
every window the same size. Cutting each axis into segments of unequal size gives the same windows without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .shortcuts import cached, is_recorded, is_transforming, may_use_functions


class WindowGroup(NamedTuple):
    """``count`` windows of one size, ``height`` x ``width`` tokens."""

    height: int
    width: int
    count: int

    @property
    def num_tokens(self) -> int:
        return self.height * self.width * self.count


class Windows:
    """Windows of a ``(B, H, W)`` map, all of them or a part, group after group.

    Tokens are in window order if those of a window follow each other, row by row, group after group.

    Args:
        groups (Sequence[WindowGroup]): at most nine.
        window (int): window size in tokens.
        shift (int): offset of the window grid in tokens.
        index (Callable): computes `order` and `images`, when one of them is needed first.
    """

    def __init__(
        self, groups: Sequence[WindowGroup], window: int, shift: int, index: Callable[[], tuple[Tensor, Tensor]]
    ):
        self.groups, self.window, self.shift = tuple(groups), window, shift
        self._index, self._computed = index, None

    @property
    def order(self) -> Tensor:
        """(T,) int64, the flat index on the map of each token in window order."""
        return self._tensors()[0]

    @property
    def images(self) -> Tensor:
        """(T,) int64, the index in the batch of the image that each token belongs to."""
        return self._tensors()[1]

    def _tensors(self):
        if self._computed is None:
            with nullcontext() if is_recorded() else torch.inference_mode(False):  # a later pass may need gradients
                self._computed = self._index()
        return self._computed

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width in tokens that no window exceeds."""
        return max(group.height for group in self.groups), max(group.width for group in self.groups)

    def split(self, max_tokens: int, multiple: int = 1) -> list[Windows]:
        """Split into parts of whole windows, each of at most ``max_tokens`` tokens or one larger window.

        A part that ends inside a group takes a multiple of ``multiple`` tokens from it, if that many fit. A part that
        already has such a multiple starts another group only if everything that is left fits. Without tokens there is
        one part.
        """
        parts, room, left = [], 0, sum(group.num_tokens for group in self.groups)
        for height, width, count in self.groups:
            even = multiple // math.gcd(multiple, height * width)  # windows
            if left > room and multiple > 1 and parts and sum(group.num_tokens for group in parts[-1]) % multiple == 0:
                room = 0
            left -= height * width * count
            while count > 0:
                fitting = min(count, room // (height * width))
                if fitting < 1:
                    parts.append([])
                    room = max(max_tokens, height * width)
                    continue
                if even <= fitting < count:
                    fitting, room = fitting - fitting % even, 0
                parts[-1].append(WindowGroup(height, width, fitting))
                room -= parts[-1][-1].num_tokens
                count -= fitting
        sizes = [sum(group.num_tokens for group in groups) for groups in parts]
        tokens = zip(self.order.split(sizes), self.images.split(sizes))
        return [
            Windows(groups, self.window, self.shift, lambda computed=computed: computed)
            for groups, computed in zip(parts, tokens)
        ] or [self]


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
    for start, end in zip(cuts, cuts[1:]):
        starts_by_size.setdefault(end - start, []).append(start)
    return starts_by_size


@cached
def partition(batch: int, height: int, width: int, window: int, shift: int, device=None) -> Windows:
    """Partition a ``(batch, height, width)`` map into ragged windows: the product of its row and column segments.

    The last 16 partitions are kept, twice what a backbone of four stages needs for one image size.

    Args:
        batch (int), height (int), width (int): the map's shape in tokens.
        window (int): window size in tokens.
        shift (int): offset of the window grid in tokens, 0 in even blocks and ``window // 2`` in odd blocks.
        device (torch.device, optional): where the index tensors live.
    """
    rows, columns = (axis_segments(length, window, shift) for length in (height, width))
    groups = [
        WindowGroup(h, w, batch * len(row_starts) * len(column_starts))
        for h, row_starts in rows.items()
        for w, column_starts in columns.items()
    ]

    def index():
        order = _window_order(batch, height, width, rows, columns, device)
        return order, order.div(height * width, rounding_mode='floor')

    return Windows(groups, window, shift, index)


def _window_order(batch, height, width, rows, columns, device):
    def positions(starts, size):
        return torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)  # (count, size)

    images = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1)
    orders = []
    for h, row_starts in rows.items():
        of_rows = positions(row_starts, h)[:, None, :, None]
        for w, column_starts in columns.items():
            of_columns = positions(column_starts, w)[:, None, :]
            orders.append(((images * height + of_rows) * width + of_columns).flatten())  # (B, rows, columns, h, w) flat
    return torch.cat(orders)


class PaddedWindows(NamedTuple):
    """Windows of a map (H, W) in a graph for any size, all of ``window`` x ``window`` places, some of them padding.

    Attributes:
        window (int): window size in tokens.
        order (Tensor): (windows * window**2,) int64, the flat index on the map of the token at each place, window after
            window; at padding that of any token.
        is_token (Tensor): the same shape, bool, False at padding.
        places (Tensor): (H * W,) int64, the place of each token: the inverse of ``order``.
    """

    window: int
    order: Tensor
    is_token: Tensor
    places: Tensor

    @property
    def largest(self) -> tuple[int, int]:
        """As in `Windows`."""
        return self.window, self.window


def pad_windows(height: int, width: int, window: int, shift: int, device=None) -> PaddedWindows:
    """The windows of `partition`, padded to equal size. Nothing but shapes depends on height and width.

    Args:
        height (int), width (int): the map's shape in tokens; they may be symbolic.
        window (int), shift (int), device (torch.device, optional): as in `partition`.
    """
    rows, columns = (_pad_axis(length, window, shift, device) for length in (height, width))
    order = rows.tokens[:, None, :, None] * width + columns.tokens[:, None]  # (rows, columns, window, window)
    is_token = rows.is_token[:, None, :, None] & columns.is_token[:, None]
    places = rows.windows[:, None] * columns.tokens.shape[0] + columns.windows  # (H, W), the window of each token
    places = (places * window + rows.places[:, None]) * window + columns.places
    return PaddedWindows(window, order.flatten(), is_token.flatten(), places.flatten())


class _PaddedAxis(NamedTuple):
    tokens: Tensor  # (windows, window), the index on the axis of the token at each place; 0 at padding
    is_token: Tensor  # (windows, window), False at padding
    windows: Tensor  # (length,), the window of each token
    places: Tensor  # (length,), its place in there


def _pad_axis(length, window, shift, device):
    """`axis_segments`, each padded to a window."""
    count = ((window - shift) % window + length + window - 1) // window
    before = (window - shift) % window * (torch.scalar_tensor(length, device=device) > window)  # padding
    tokens = torch.arange(count * window, device=device).view(count, window) - before
    is_token = (tokens >= 0) & (tokens < length)
    places = torch.arange(length, device=device) + before
    return _PaddedAxis(torch.where(is_token, tokens, 0), is_token, places // window, places % window)


def gather(x: Tensor, parts: Sequence[Windows]) -> tuple[Tensor, ...]:
    """Put the tokens of a map ``(B, H, W, C)`` into window order: ``(T, C)`` for each part."""
    return _Gather.apply(x.flatten(0, 2), tuple(part.order for part in parts))


def scatter(tokens: Sequence[Tensor], parts: Sequence[Windows], batch: int, height: int, width: int) -> Tensor:
    """Put the tokens of all parts, ``(T, C)`` each, back onto their map ``(B, H, W, C)``: the inverse of `gather`."""
    rows = _Scatter.apply(tuple(part.order for part in parts), *tokens)
    return rows.view(batch, height, width, rows.shape[1])


def map_windows(function: Callable[[Tensor, Windows], Tensor], x: Tensor, parts: Sequence[Windows]) -> Tensor:
    """Apply a function of the tokens of some windows to a map, part by part.

    Args:
        function (Callable): takes tokens ``(T, C)`` in window order and the part that holds them, gives ``(T, D)``.
        x (Tensor): (B, H, W, C).
        parts (Sequence[Windows]): hold every token of the map once.

    Returns:
        Tensor: (B, H, W, D).
    """
    rows = x.flatten(0, 2)
    if x.requires_grad and torch.is_grad_enabled() and may_use_functions():
        tokens = gather(x, parts)
    else:
        tokens = (rows.index_select(0, part.order) for part in parts)
    computed = (function(tokens_of, part) for tokens_of, part in zip(tokens, parts))
    first = next(computed)  # shows whether anything needs a gradient: weights, or what a hook brings in
    if is_transforming():
        order = torch.cat([part.order for part in parts])
        return torch.cat([first, *computed]).index_select(0, order.argsort()).view(*x.shape[:3], first.shape[1])
    if first.requires_grad and may_use_functions():
        return scatter([first, *computed], parts, *x.shape[:3])
    out = first.new_empty(rows.shape[0], first.shape[1]).index_copy_(0, parts[0].order, first)
    for part, tokens_of in zip(parts[1:], computed):  # so no tensor of a part outlives it
        out.index_copy_(0, part.order, tokens_of)
    return out.view(*x.shape[:3], out.shape[1])


class _Gather(torch.autograd.Function):
    """Rows in the order of each part. Its backward copies rows, where that of `index_select` adds to zeros."""

    @staticmethod
    def forward(ctx, rows, orders):
        ctx.orders = orders
        return tuple(rows.index_select(0, order) for order in orders)

    @staticmethod
    def backward(ctx, *grads):
        return _Scatter.apply(ctx.orders, *grads), None


class _Scatter(torch.autograd.Function):
    """The inverse of `_Gather`."""

    @staticmethod
    def forward(ctx, orders, *parts):
        ctx.orders = orders
        rows = parts[0].new_empty(sum(len(part) for part in parts), parts[0].shape[1])
        for order, part in zip(orders, parts):
            rows.index_copy_(0, order, part)
        return rows

    @staticmethod
    def backward(ctx, grad):
        return None, *_Gather.apply(grad, ctx.orders)
