"""Position bias of window attention: continuous or parameterized (arXiv 2111.09883, section 3.3)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shortcuts import LastResult, cached, is_plain

CPB_HIDDEN_DIMS = 512
HIDDEN_VALUES = 2**23  # of the position MLPs of several blocks at once, 32 MiB in float32


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
    scaled = 8 * linear_spaced_coordinates(height, width, pretrained_window, device, dtype)
    return scaled.sign() * torch.log2(1 + scaled.abs()) / math.log2(8)


def linear_spaced_coordinates(height: int, width: int, pretrained_window: int, device=None, dtype=None) -> Tensor:
    """Linear-spaced offsets, the alternative that the paper compares with; otherwise as `log_spaced_coordinates`.

    Returns:
        Tensor: (2*height-1, 2*width-1, 2). Within the pretrained window they lie in [-1, 1].
    """
    rows = torch.arange(1 - height, height, device=device, dtype=dtype)
    columns = torch.arange(1 - width, width, device=device, dtype=dtype)
    offsets = torch.stack(torch.meshgrid(rows, columns, indexing='ij'), dim=-1)  # (2h-1, 2w-1, 2)
    return offsets * (1 / max(pretrained_window - 1, 1))


def table_centre(table: Tensor, height: int, width: int) -> Tensor:
    """The part of a table ``(heads, 2H-1, 2W-1)`` that smaller windows use: a view, ``(heads, 2h-1, 2w-1)``."""
    rows, columns = (side // 2 for side in table.shape[1:])
    return table[:, rows - height + 1 : rows + height, columns - width + 1 : columns + width]


def resize_table(table: Tensor, window: int) -> Tensor:
    """Resize a learned table of biases to another window, bicubically, as the code of Swin V1 does on fine-tuning.

    Args:
        table (Tensor): ((2P-1)^2, heads), for windows of P x P tokens.
        window (int): the new window size W in tokens.

    Returns:
        Tensor: ((2W-1)^2, heads).
    """
    old, new = 2 * table_window(table) - 1, 2 * window - 1
    if old == new:
        return table
    image = table.T.reshape(1, -1, old, old).to(torch.promote_types(table.dtype, torch.float32))
    return F.interpolate(image, size=(new, new), mode='bicubic').flatten(2)[0].T.to(table.dtype)


def table_window(table: Tensor) -> int:
    """The window size P in tokens of a ((2P-1)^2, heads) table of biases.

    Raises:
        ValueError: the table has another shape.
    """
    side = math.isqrt(table.shape[0]) if table.ndim == 2 else 0
    if side % 2 == 0 or side**2 != table.shape[0]:
        raise ValueError(f'a table of position biases is ((2W-1)^2, heads) for window W, got {tuple(table.shape)}')
    return (side + 1) // 2


class PositionBias(nn.Module, ABC):
    """A bias for every head and every offset between two tokens of a window, in windows of any size.

    Attributes:
        kind (str): the value of the backbone's argument ``position_bias`` that chooses it.
        name (str): its name in the attention module, and so in the state dict. Each kind has its own, so that weights
            of one never load as another.
        has_pretrained_window (bool): whether the window it was trained with is a setting beside its weights.
    """

    kind: str
    name: str
    has_pretrained_window: bool

    @abstractmethod
    def forward(self, height: int, width: int) -> Tensor:
        """Position bias of every offset within windows of up to ``height`` x ``width`` tokens.

        Returns:
            Tensor: (heads, 2*height-1, 2*width-1), in float32 or wider.
        """

    def set_window(self, window: int):
        """Prepare for windows of another size in tokens."""

    # What a checkpoint's weights say, before there is a module to load them into.

    @classmethod
    def window_of(cls, weights: Mapping[str, Tensor]) -> int | None:
        """The window size in tokens that the shapes of weights show.

        Args:
            weights (Mapping): tensors by their names in this module.

        Returns:
            int: None if no weight shows it, because none depends on it or the one that does is missing.

        Raises:
            ValueError: a shape fits no window.
        """
        return None

    @classmethod
    def resize_weight(cls, weight: Tensor, own: Tensor) -> Tensor:
        """Resize a weight of another window to the shape of the module's own, if weights depend on the window.

        Raises:
            ValueError: a shape fits no window.
        """
        return weight


class ContinuousPositionBias(PositionBias, nn.Sequential):
    """A small MLP from log-spaced offsets to one bias per head.

    On CPU, and if no gradient is needed, its last result is kept for as long as the weights have the same values.

    Args:
        num_heads (int): attention heads.
        pretrained_window (int): the window size in tokens that the weights were, or will be, trained with.
    """

    kind, name, has_pretrained_window = 'log_cpb', 'cpb_mlp', True
    coordinates = staticmethod(cached(log_spaced_coordinates))

    def __init__(self, num_heads: int, pretrained_window: int):
        super().__init__(nn.Linear(2, CPB_HIDDEN_DIMS), nn.ReLU(), nn.Linear(CPB_HIDDEN_DIMS, num_heads, bias=False))
        self.pretrained_window = pretrained_window
        self._last = LastResult()

    def forward(self, height: int, width: int) -> Tensor:
        if not self._is_plain():
            return self.table(height, width)
        key = height, width, self.pretrained_window
        return self._last.get(lambda: self.table(height, width), key, self.weights)

    def table(self, height: int, width: int) -> Tensor:
        """Compute what `forward` returns, without the kept result.

        Always in float32 or wider, because the bias reaches 16, where the steps of bfloat16 are 1/16.
        """
        plain = self._is_plain()
        weights = self.weights if plain else filter(torch.is_floating_point, self.parameters())
        weight = next(iter(weights), torch.empty(0, device='cpu'))  # quantised layers have none, and run on CPU
        dtype = torch.promote_types(weight.dtype, torch.float32)
        coordinates = self.coordinates(height, width, self.pretrained_window, weight.device, dtype)
        with torch.autocast(weight.device.type, enabled=False):
            if plain:
                weight1, bias1, weight2 = (weight.to(dtype) for weight in weights)
                out = F.linear(F.relu(F.linear(coordinates, weight1, bias1)), weight2)
            else:
                out = nn.Sequential.forward(self, coordinates.to(weight.dtype)).to(dtype)
            return 16 * torch.sigmoid(out).permute(2, 0, 1)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """(512, 2), (512,) and (heads, 512)."""
        return self[0].weight, self[0].bias, self[2].weight

    def is_alike(self, other: PositionBias) -> bool:
        """Whether both are the same function of their weights, whose shapes and dtypes are the same."""
        if type(other) is not type(self) or not (
            self._is_plain() and is_plain(other, type(self)) and other._is_plain()
        ):
            return False
        kinds = ([(x.shape, x.dtype, x.device) for x in bias.weights] for bias in (self, other))
        return self.pretrained_window == other.pretrained_window and next(kinds) == next(kinds)

    def _is_plain(self):
        kinds = nn.Linear, nn.ReLU, nn.Linear
        if len(self) != len(kinds) or not all(map(is_plain, self, kinds)):
            return False
        return self[0].bias is not None and self[2].bias is None


class LinearContinuousPositionBias(ContinuousPositionBias):
    """`ContinuousPositionBias` from linear-spaced offsets: the second row of the paper's Table 1."""

    kind, name = 'linear_cpb', 'linear_cpb_mlp'
    coordinates = staticmethod(cached(linear_spaced_coordinates))


class ParameterizedPositionBias(PositionBias):
    """A learned table with one bias per head and offset, as in Swin V1: the first row of the paper's Table 1.

    Its parameter is ((2W-1)^2, heads) for window W, and serves windows up to that. `set_window` and loading resize it,
    so set the window before an optimizer takes the parameter.

    Args:
        num_heads (int): attention heads.
        window (int): window size in tokens.
    """

    kind, name, has_pretrained_window = 'parameterized', 'relative_position_bias_table', False

    def __init__(self, num_heads: int, window: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, num_heads), std=0.02))

    @property
    def pretrained_window(self) -> int:
        """The window size in tokens that the table is for."""
        return table_window(self.weight)

    def forward(self, height: int, width: int) -> Tensor:
        window = self.pretrained_window
        table = self.weight.T.unflatten(1, (2 * window - 1, -1))  # (heads, 2W-1, 2W-1)
        return table_centre(table.to(torch.promote_types(table.dtype, torch.float32)), height, width)

    def set_window(self, window: int):
        self.weight.data = resize_table(self.weight.data, window)
        self.weight.grad = None

    @classmethod
    def window_of(cls, weights: Mapping[str, Tensor]) -> int | None:
        return table_window(weights['weight']) if 'weight' in weights else None

    @classmethod
    def resize_weight(cls, weight: Tensor, own: Tensor) -> Tensor:
        return resize_table(weight, table_window(own))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = f'{prefix}weight'
        if name in state_dict:
            state_dict[name] = resize_table(state_dict[name], self.pretrained_window)
        super()._load_from_state_dict(state_dict, prefix, *args)


def tables_at_once(biases: Sequence[PositionBias], height: int, width: int) -> list[Tensor]:
    """What `PositionBias.forward` gives for each of the blocks of a stage, in batched products where they are alike."""
    if len(biases) < 2 or not isinstance(biases[0], ContinuousPositionBias) or not all(map(biases[0].is_alike, biases)):
        return [bias(height, width) for bias in biases]
    at_once = max(HIDDEN_VALUES // (CPB_HIDDEN_DIMS * (2 * height - 1) * (2 * width - 1)), 1)
    groups = [biases[i : i + at_once] for i in range(0, len(biases), at_once)]
    return [table for group in groups for table in _batched_tables(group, height, width)]


def _batched_tables(biases, height, width):
    """(blocks, heads, 2*height-1, 2*width-1)."""
    weight1, bias1, weight2 = (torch.stack(weights) for weights in zip(*(bias.weights for bias in biases)))
    dtype = torch.promote_types(weight1.dtype, torch.float32)
    coordinates = biases[0].coordinates(height, width, biases[0].pretrained_window, weight1.device, dtype)
    with torch.autocast(weight1.device.type, enabled=False):
        hidden = torch.matmul(coordinates.view(-1, 2), weight1.to(dtype).mT) + bias1[:, None].to(dtype)
        out = torch.matmul(weight2.to(dtype), F.relu(hidden).mT)  # (blocks, heads, offsets)
        return (16 * torch.sigmoid(out)).unflatten(2, coordinates.shape[:2]).unbind()


POSITION_BIASES = {
    position_bias.kind: position_bias
    for position_bias in (ContinuousPositionBias, LinearContinuousPositionBias, ParameterizedPositionBias)
}
