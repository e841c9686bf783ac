"""Log-spaced continuous position bias (Swin Transformer V2, arXiv 2111.09883, section 3.3)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log_spaced_coordinates(height: int, width: int, pretrained_window: int, device=None, dtype=None) -> Tensor:
    """Log-spaced offsets between the tokens of a window (equation 4; `relative_coords_table` of the official code).

    Args:
        height (int), width (int): window size in tokens.
        pretrained_window (int): the window size in tokens that the position MLP was trained with. It normalises the
            offsets, so that an offset keeps its coordinate in any other window.

    Returns:
        Tensor: (2*height-1, 2*width-1, 2), vertical and horizontal coordinate of the offset query minus key. Within
        the pretrained window they lie in [-1.06, 1.06].
    """
    rows = torch.arange(1 - height, height, device=device, dtype=dtype)
    columns = torch.arange(1 - width, width, device=device, dtype=dtype)
    offsets = torch.stack(torch.meshgrid(rows, columns, indexing='ij'), dim=-1)  # (2h-1, 2w-1, 2)
    scaled = offsets * (8 / max(pretrained_window - 1, 1))
    return scaled.sign() * torch.log2(1 + scaled.abs()) / math.log2(8)


def relative_position_index(height: int, width: int, device=None) -> Tensor:
    """Index of every (query, key) pair of a window in its flat table of offsets.

    Returns:
        Tensor: (h*w, h*w) int64, into a table of (2h-1) x (2w-1) offsets.
    """
    rows = torch.arange(height, device=device).repeat_interleave(width)  # (h*w,)
    columns = torch.arange(width, device=device).repeat(height)  # (h*w,)
    row_offsets = rows[:, None] - rows + height - 1
    column_offsets = columns[:, None] - columns + width - 1
    return row_offsets * (2 * width - 1) + column_offsets


class ContinuousPositionBias(nn.Sequential):
    """A small MLP from log-spaced offsets to one bias per head, for windows of any size.

    In eval, where no gradient is needed, the bias of each shape is computed once and kept. `train()`, `eval()`,
    loading, moving, and changes of the weights drop what was kept; of changes only those through ``.data``, which
    PyTorch does not count, go unseen until `eval()` is called.

    Args:
        num_heads (int): attention heads.
        pretrained_window (int): the window size in tokens that the weights were, or will be, trained with.
    """

    def __init__(self, num_heads: int, pretrained_window: int):
        super().__init__(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.pretrained_window = pretrained_window
        self.drop_kept()

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Position bias for windows of each given shape.

        Args:
            shapes (Sequence[tuple[int, int]]): heights and widths in tokens.

        Returns:
            list[Tensor]: (1, heads, h*w, h*w) for each shape, in float32 or wider.
        """
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.training or needs_grad or torch.compiler.is_compiling():
            return self._compute(shapes)
        if not self._kept_is_current():
            self.drop_kept()
            self._kept_for = [(p, _version(p)) for p in self.parameters()]
        missing = [shape for shape in shapes if shape not in self._kept]
        if missing:
            with torch.inference_mode(False), torch.no_grad():
                self._kept.update(zip(missing, self._compute(missing)))
        return [self._kept[shape] for shape in shapes]

    def table(self, height: int, width: int) -> Tensor:
        """Position bias of every offset within a window, ``(heads, 2*height-1, 2*width-1)``.

        Computed in float32 or wider under any autocast: the bias reaches 16, where bfloat16 steps are 1/16.
        """
        hidden, _, out = self
        dtype = torch.promote_types(out.weight.dtype, torch.float32)
        coordinates = log_spaced_coordinates(height, width, self.pretrained_window, out.weight.device, dtype)
        with torch.autocast(out.weight.device.type, enabled=False):
            features = F.relu(F.linear(coordinates, hidden.weight.to(dtype), hidden.bias.to(dtype)))
            return 16 * torch.sigmoid(F.linear(features, out.weight.to(dtype))).permute(2, 0, 1)

    def _compute(self, shapes):
        # One table serves all shapes: that of a smaller window is its centre.
        height, width = (max(sizes) for sizes in zip(*shapes))
        table = self.table(height, width)
        biases = []
        for h, w in shapes:
            offsets = table[:, height - h : height + h - 1, width - w : width + w - 1].flatten(1)
            index = relative_position_index(h, w, table.device)
            biases.append(offsets.index_select(1, index.flatten()).view(1, -1, h * w, h * w))
        return biases

    def drop_kept(self):
        """Forget every bias kept so far."""
        self._kept, self._kept_for = {}, []

    def _kept_is_current(self):
        kept_for = zip(self._kept_for, self.parameters(), strict=False)
        return bool(self._kept_for) and all(p is now and version == _version(now) for (p, version), now in kept_for)

    def train(self, mode: bool = True):
        self.drop_kept()
        return super().train(mode)

    def __getstate__(self):
        return {**self.__dict__, '_kept': {}, '_kept_for': []}  # copies and pickles compute their own

    def _apply(self, fn, recurse=True):
        self.drop_kept()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self.drop_kept()
        super()._load_from_state_dict(*args)


def _version(parameter):
    return 0 if parameter.is_inference() else parameter._version  # inference tensors count no versions
