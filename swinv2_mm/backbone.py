"""Swin Transformer V2 (arXiv 2111.09883) as a backbone for dense prediction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import index

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import compat
from .arch import has_extra_norm, parse_arch, per_stage
from .blocks import WindowAttention
from .checkpoints.files import CheckpointError
from .checkpoints.formats import COMPUTED, convert, identify
from .checkpoints.loading import load_pretrained
from .checkpoints.windows import windows_from_buffer, windows_from_tables
from .messages import warn
from .ops.linear import ONEDNN_ROWS, apply_linear
from .other_names import refuse_other_names
from .position_bias import POSITION_BIASES
from .shortcuts import is_plain, is_transforming
from .windows import Windows, largest_window, map_windows, partition

PART_SIZE = 2**19  # elements of a part of the map on CPU: what a block computes of it stays in the cache


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch for whole images of the batch."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """``x (B, ...)`` with whole images dropped, and the others scaled so that the mean stays."""
        if not self.drops:
            return x
        keep_prob = 1 - self.drop_prob
        return x * x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(keep_prob) / keep_prob

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.drop_prob > 0.0


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the dtype of its weights, so that autocast leaves the residual stream in float32 on any device.

    On CUDA autocast does so by itself; on CPU it would keep the half precision of the branch.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def _pad(x, padding):
    return F.pad(x, padding) if any(padding) else x  # without padding F.pad would copy


class PatchEmbed(nn.Module):
    """Image to patch embeddings: ``(B, 3, H, W)`` to ``(B, ceil(H/patch), ceil(W/patch), C)``, zero-padded."""

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)
        self.norm = LayerNorm(embed_dims)

    def forward(self, image: Tensor) -> Tensor:
        # Plain ints: under torch.compile each image size gets its own graph, which is what ragged windows need.
        height, width = (index(size) for size in image.shape[-2:])
        if torch.jit.is_tracing():  # the sizes become constants: of another size this fails, and nothing else would
            image = image.split([height], 2)[0].split([width], 3)[0]
        image = _pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size))
        if not is_transforming():
            image = image.contiguous(memory_format=torch.channels_last)  # so that what the norm takes is contiguous
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Merge 2 x 2 neighbours: ``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), 2C)``, zero-padded.

    The neighbours are concatenated column by column, as in the official code, and normalised after the reduction.
    """

    def __init__(self, embed_dims: int):
        super().__init__()
        self.reduction = nn.Linear(4 * embed_dims, 2 * embed_dims, bias=False)
        self.norm = LayerNorm(2 * embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape[0], *map(index, x.shape[1:])
        x = _pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C)
        return self.norm(self.reduction(x))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, embed_dims: int, hidden_dims: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = apply_linear(self.fc1, x)
        if is_plain(self.drop, nn.Dropout) and not (self.drop.training and self.drop.p > 0):
            return apply_linear(self.fc2, hidden, of_gelu=True)
        return self.drop(apply_linear(self.fc2, self.drop(F.gelu(hidden))))


class Block(nn.Module):
    """Window attention and MLP, each normalised after it and before it is added (residual post-norm, section 3.2).

    Args:
        embed_dims (int), num_heads (int), pretrained_window (int), qkv_bias (bool): as in `WindowAttention`.
        mlp_ratio (float): hidden dimension of the MLP over ``embed_dims``.
        drop (float): dropout after every linear layer but qkv.
        attn_drop (float): dropout of attention weights.
        drop_path (float): probability of dropping each of the two branches.
        extra_norm (bool): whether a LayerNorm on the main branch ends the block (huge and giant).
        position_bias (str): as in `WindowAttention`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        pretrained_window: int,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        extra_norm: bool = False,
        position_bias: str = 'log_cpb',
    ):
        super().__init__()
        self.attn = WindowAttention(embed_dims, num_heads, pretrained_window, qkv_bias, attn_drop, drop, position_bias)
        self.norm1 = LayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, int(mlp_ratio * embed_dims), drop)
        self.norm2 = LayerNorm(embed_dims)
        self.drop_path = DropPath(drop_path)
        self.norm3 = LayerNorm(embed_dims) if extra_norm else nn.Identity()

    def forward(self, x: Tensor, parts: Sequence[Windows], with_cp: bool = False) -> Tensor:
        """``(B, H, W, C)`` to the same, part by part of the windows, each a whole forward pass of its own.

        Args:
            x (Tensor): (B, H, W, C).
            parts (Sequence[Windows]): windows of the map, which together have every token once.
            with_cp (bool): whether each part runs again in the backward pass instead of keeping what it computed.
        """
        table = self.attn.position_bias(*largest_window(parts))
        kept = self._branch_factors(x), self._branch_factors(x)  # drawn once for all parts

        def forward(tokens, part):
            factors = (None if factor is None else factor.index_select(0, part.images) for factor in kept)  # (T, 1)
            return self._forward_tokens(tokens, part.groups, table, *factors)

        return map_windows(partial(checkpoint, forward, use_reentrant=False) if with_cp else forward, x, parts)

    def _branch_factors(self, x):
        """What a branch of each image is multiplied with, (B, 1); None if nothing is dropped."""
        if is_plain(self.drop_path, DropPath) and not self.drop_path.drops:
            return None
        return self.drop_path(x.new_ones(x.shape[0], 1))

    def _forward_tokens(self, x, groups, table, kept1, kept2):
        x = _add(x, self.norm1(self.attn(x, groups, table)), kept1)  # (T, C)
        x = _add(x, self.norm2(self.mlp(x)), kept2)
        return self.norm3(x)


def _add(x, branch, factor):
    return x + branch if factor is None else torch.addcmul(x, branch, factor)


class Stage(nn.Module):
    """Blocks of one resolution, every other one with shifted windows, and the way down to the next stage.

    ``downsample`` stands beside the blocks and is not part of `forward`, because the pyramid takes the map before it.
    """

    def __init__(self, blocks: list[Block], downsample: nn.Module, window_size: int, with_cp: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.window_size = window_size
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same."""
        plain, shifted = (self._parts(x, shift) for shift in (0, self.window_size // 2))
        for i, block in enumerate(self.blocks):
            x = block(x, shifted if i % 2 else plain, self.with_cp and self.training)
        return x

    def _parts(self, x, shift):
        # Plain ints, for a tracer has tensors there. The batch stays what it is, so that one graph serves any.
        height, width = map(index, x.shape[1:3])
        windows = partition(x.shape[0], height, width, self.window_size, shift, x.device)
        if x.device.type != 'cpu' or compat.is_compiling() or torch.jit.is_tracing():
            return [windows]
        return windows.split(max(PART_SIZE // x.shape[3], 1), ONEDNN_ROWS)


@MODELS.register_module()
class SwinTransformerV2(BaseModule):
    """Swin Transformer V2: an image to a pyramid of feature maps.

    Args:
        arch (str | dict): tiny, small, base, large, huge or giant; or a dict with ``embed_dims``, ``depths``,
            ``num_heads`` and, optionally, ``extra_norm_every_n_blocks``.
        in_channels (int): channels of the image.
        patch_size (int): stride of the first stage in pixels.
        window_size (int | Sequence[int]): window size in tokens, one for all stages or one per stage.
        pretrained_window_sizes (int | Sequence[int], optional): the window size per stage that the position MLPs were
            trained with, as large as the map of that stage at most: (16, 16, 16, 8) for 256 pixels and window 16. It
            stays what it was through fine-tuning at other windows. None: what the checkpoint says, and without a
            checkpoint ``window_size``.
        position_bias (str): log_cpb, the log-spaced continuous position bias; for comparison (the paper's Table 1)
            also linear_cpb, the same MLP on linear-spaced offsets, and parameterized, a learned table that is resized
            bicubically when the window changes. The table is of ``window_size`` and has no pretrained_window_sizes.
        mlp_ratio (float): hidden dimension of the MLPs over their input dimension.
        qkv_bias (bool): whether queries and values have a bias.
        drop_rate (float): dropout in attention output and MLP.
        attn_drop_rate (float): dropout of attention weights.
        drop_path_rate (float): stochastic depth of the last block; it grows linearly from 0 at the first.
        out_indices (Sequence[int]): stages whose maps are returned. Those after the last of them are not built.
        frozen_stages (int): -1 freezes nothing, 0 the patch embedding, n also the first n stages with their norms.
        with_cp (bool): activation checkpointing of every block in training: less memory, more time.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` loads weights, as
            `load_pretrained` does; ``allow_missing`` and ``prefix`` go there too. mmengine's ``map_location`` may stand
            there: files are read onto the CPU.
        others: not accepted; the error says what arguments of other implementations are called here.

    Raises:
        ValueError: an argument is out of its range; the message names it, its value and what would be right.
        TypeError: an argument has another name here, or none.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        patch_size: int = 4,
        window_size: int | Sequence[int] = 16,
        pretrained_window_sizes: int | Sequence[int] | None = None,
        position_bias: str = 'log_cpb',
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        **others,
    ):
        refuse_other_names(arch, others)
        super().__init__(init_cfg)
        self.arch = arch = parse_arch(arch)
        num_stages = len(arch.depths)
        windows = per_stage('window_size', window_size, num_stages)
        if position_bias not in list(POSITION_BIASES):
            raise ValueError(f'position_bias must be one of {", ".join(POSITION_BIASES)}, got {position_bias!r}')
        if position_bias == 'parameterized' and pretrained_window_sizes is not None:
            raise ValueError(
                "pretrained_window_sizes is for a continuous position bias, and position_bias='parameterized' is a "
                f'table of window_size: leave it out, got {pretrained_window_sizes!r}'
            )
        self.position_bias = position_bias
        self.pretrained_windows_given = pretrained_window_sizes is not None
        if self.pretrained_windows_given:
            pretrained_windows = per_stage('pretrained_window_sizes', pretrained_window_sizes, num_stages)
        else:
            pretrained_windows = windows
        self.out_indices = _check_out_indices(out_indices, num_stages)
        built = self.out_indices[-1] + 1  # stages; others would get no gradient
        if frozen_stages not in range(-1, num_stages + 1):
            raise ValueError(f'frozen_stages must be -1 to {num_stages}, got {frozen_stages!r}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be at least 0 and less than 1, got {drop_path_rate!r}')
        self.frozen_stages = frozen_stages

        self.patch_embed = PatchEmbed(in_channels, arch.embed_dims, patch_size)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(arch.depths), device='cpu').tolist())
        self.layers = nn.ModuleList()
        for i, (depth, num_heads) in enumerate(zip(arch.depths[:built], arch.num_heads)):
            embed_dims = arch.embed_dims * 2**i
            blocks = [
                Block(
                    embed_dims,
                    num_heads,
                    pretrained_windows[i],
                    qkv_bias,
                    mlp_ratio,
                    drop_rate,
                    attn_drop_rate,
                    next(drop_paths),
                    has_extra_norm(arch, j),
                    position_bias,
                )
                for j in range(depth)
            ]
            downsample = PatchMerging(embed_dims) if i + 1 < built else nn.Identity()
            self.layers.append(Stage(blocks, downsample, windows[i], with_cp))
            if i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm(embed_dims))
        # In the state dict, so that a fine-tuned checkpoint says which windows its position MLPs were trained with.
        self.register_buffer('pretrained_windows', torch.tensor(pretrained_windows[:built]))
        self._init_from_scratch()
        self._freeze()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of an image of any size.

        Args:
            image (Tensor): (B, in_channels, H, W).

        Returns:
            tuple[Tensor]: for each of ``out_indices`` a contiguous (B, C * 2**i, ceil(H / s), ceil(W / s)) map of
            stride s = patch_size * 2**i.
        """
        outs = []
        x = self.patch_embed(image)  # (B, H/4, W/4, C)
        for i, stage in enumerate(self.layers):
            if i > 0:
                x = self.layers[i - 1].downsample(x)
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    @property
    def window_size(self) -> tuple[int, ...]:
        """Window size in tokens, per stage that is built."""
        return tuple(stage.window_size for stage in self.layers)

    def set_window_size(self, window_size: int | Sequence[int]):
        """Attend in other windows from now on. Parameters and ``pretrained_window_sizes`` stay.

        With ``position_bias='parameterized'`` the tables are resized, which loses some of them; do it before an
        optimizer takes them.

        Args:
            window_size (int | Sequence[int]): window size in tokens, one for all stages or one per stage.

        Raises:
            ValueError: a window is smaller than one token, or their number is not that of the stages.
        """
        if isinstance(window_size, (Sequence, np.ndarray)):
            window_size = self.of_built_stages(window_size) or window_size
        for stage, window in zip(self.layers, per_stage('window_size', window_size, len(self.layers))):
            stage.window_size = window
            for block in stage.blocks:
                block.attn.position_bias.set_window(window)
        self.pretrained_windows.copy_(torch.tensor(self.pretrained_window_sizes))

    @property
    def pretrained_window_sizes(self) -> tuple[int, ...]:
        """The window size per stage that normalises the position MLPs, or that the parameterized tables have."""
        return tuple(stage.blocks[0].attn.position_bias.pretrained_window for stage in self.layers)

    def of_built_stages(self, values: Sequence) -> tuple | None:
        """The values of the stages that are built, from one for each of them or of all; None from another number."""
        built = len(self.layers)
        return tuple(values[:built]) if len(values) in (built, len(self.arch.depths)) else None

    def _set_pretrained_window_sizes(self, windows: Sequence[int]):
        for stage, window in zip(self.layers, windows):
            for block in stage.blocks:
                block.attn.position_bias.pretrained_window = window
        self.pretrained_windows.copy_(torch.tensor(windows))

    def init_weights(self):
        """Load the checkpoint that ``init_cfg`` names; without one the initialisation from scratch stays.

        Raises:
            CheckpointError: the checkpoint can't be read, or is none of this architecture.
        """
        if self.init_cfg is not None:
            load_pretrained(self, *self.pretrained_source())

    def pretrained_source(self) -> tuple[str, str | Sequence[str], str]:
        """The path or URL that ``init_cfg`` names, its ``allow_missing`` and its ``prefix``.

        Raises:
            ValueError: it has any other form.
        """
        cfg = self.init_cfg if isinstance(self.init_cfg, dict) else {}
        keys, optional = {'type', 'checkpoint'}, {'allow_missing', 'prefix', 'map_location'}
        if cfg.get('type') != 'Pretrained' or not keys <= set(cfg) <= keys | optional:
            raise ValueError(
                "init_cfg must be None or dict(type='Pretrained', checkpoint=PATH_OR_URL), optionally with "
                f'allow_missing=[NAME, ...] and prefix=NAME, got {self.init_cfg!r}'
            )
        return cfg['checkpoint'], cfg.get('allow_missing', ()), cfg.get('prefix') or ''

    def train(self, mode: bool = True):
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self):
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed]
        for i in range(min(self.frozen_stages, len(self.layers))):
            frozen.append(self.layers[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def _init_from_scratch(self):
        """The official initialisation: blocks start as the identity, because their post-norms start at weight 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block):
                nn.init.zeros_(module.norm1.weight)
                nn.init.zeros_(module.norm2.weight)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        tables = self._convert(state_dict, prefix)
        loaded = self._windows_in(state_dict.get(f'{prefix}pretrained_windows'), tables)
        own = self.pretrained_window_sizes
        if loaded is None and not self.pretrained_windows_given:
            warn(f'the state dict does not say the windows it was trained with: pretrained_window_sizes stays {own}')
        elif loaded is not None and loaded != own and self.pretrained_windows_given:
            warn(
                f'the checkpoint says pretrained_window_sizes={loaded}, the argument says {own}: '
                'the argument is used, and the position bias is wrong unless it is right'
            )
        elif loaded is not None and loaded != own:
            self._set_pretrained_window_sizes(loaded)
        state_dict[f'{prefix}pretrained_windows'] = torch.tensor(self.pretrained_window_sizes, device='cpu')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _convert(self, state_dict, prefix):
        """Convert weights of another format in place, as of a detector that was trained with another implementation.

        Returns:
            dict: the tables of coordinates in the file, by our names.
        """
        theirs = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        theirs = {name: value for name, value in theirs.items() if isinstance(value, Tensor)}
        if all(name in theirs for name, _ in self.named_parameters()) and 'pretrained_windows' in theirs:
            return {}
        try:
            _, inner = identify(theirs)
            if inner:
                return {}
            converted = convert(theirs)
        except CheckpointError:
            return {}  # no whole backbone: whoever loads says what is missing
        left = [name for name, why in converted.left_out.items() if why != COMPUTED]  # whoever loads says that too
        for name in set(theirs) - set(left):
            del state_dict[prefix + name]
        state_dict.update({prefix + name: value for name, value in converted.weights.items()})
        return converted.tables

    def _windows_in(self, buffer, tables):
        """The pretrained windows in a state dict: those of the buffer, else of the tables; None if it has neither."""
        if not POSITION_BIASES[self.position_bias].has_pretrained_window:
            return self.pretrained_window_sizes  # loading resizes the weights
        if buffer is not None:
            return self.of_built_stages(windows_from_buffer(buffer).pretrained_window_sizes)
        found = (windows_from_tables(tables, number) for number in (len(self.arch.depths), len(self.layers)))
        return self.of_built_stages(next((w.pretrained_window_sizes for w in found if w.origin), ()))


def _check_out_indices(out_indices, num_stages):
    indices = list(out_indices) if isinstance(out_indices, Sequence) else []
    if not indices or indices != sorted(set(indices) & set(range(num_stages))):
        raise ValueError(f'out_indices must be increasing stages out of 0 to {num_stages - 1}, got {out_indices!r}')
    return tuple(indices)
