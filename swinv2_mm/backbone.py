"""Swin Transformer V2 (arXiv 2111.09883) as a backbone for dense prediction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import compat
from .arch import has_extra_norm, parse_arch, per_stage
from .blocks import Block, DropPath, LayerNorm, PatchEmbed, PatchMerging
from .checkpoints.loading import convert_in_place, load_pretrained
from .messages import warn
from .ops.linear import ONEDNN_ROWS
from .other_names import refuse_other_names
from .position_bias import POSITION_BIASES, tables_at_once
from .shortcuts import has_any_size, is_plain, may_use_operators_in_graph, side
from .windows import map_windows, pad_windows, partition

PART_SIZE = 2**19  # elements of a part of the map on CPU, so that what a block computes stays in the cache
COMPILED_PART_SIZE = 4 * PART_SIZE  # in a compiled graph, which does with fewer passes, and compiles every part


class Stage(nn.Module):
    """Blocks of one resolution, every other one with shifted windows, and the downsampling layer.

    ``downsample`` is not part of `forward`, because the pyramid takes the map before it.

    Inside a block, windows are independent of each other. So on CPU a block runs part by part. A part is a few whole
    windows, which stay in the cache; in most graphs there is one. On a GPU a block is called once with the whole map.
    So is, on any device, a block that has hooks or is wrapped (by FSDP, for example). It computes its position bias
    itself, because its parameters may be sharded until then. On CPU that takes more memory, up to twice as much in
    inference. With ``with_cp`` the forward pre-hooks of such a block run again in the backward pass, before PyTorch 2.1
    all its hooks.
    """

    def __init__(self, blocks: list[Block], downsample: nn.Module, window_size: int, with_cp: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.window_size = window_size
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks on a map ``(B, H, W, C)``, which keeps its shape."""
        height, width = map(side, x.shape[1:3])
        shifts = 0, self.window_size // 2
        if has_any_size(x):
            cuts = [pad_windows(height, width, self.window_size, shift, x.device) for shift in shifts]
        else:
            cuts = [partition(x.shape[0], height, width, self.window_size, shift, x.device) for shift in shifts]
        tables = self._tables(x, map(max, *(cut.largest for cut in cuts)))
        for i, block in enumerate(self.blocks):
            x = self._run_block(block, x, cuts[i % 2], tables.get(block))
        return x

    def _tables(self, x, largest):
        """The position biases of blocks that get the whole map, computed together, because launches cost most there."""
        blocks = [block for block in self.blocks if not runs_in_parts(x) and is_plain(block, Block)]
        tables = tables_at_once([block.attn.position_bias for block in blocks], *largest)
        return dict(zip(blocks, tables))

    def _run_block(self, block, x, windows, table):
        """Run a block on a map (B, H, W, C)."""
        scales = draw_scales(block.drop_path, x)  # once for all parts
        run = partial(checkpoint, block, use_reentrant=False) if self.with_cp and self.training else block
        if not is_plain(block, Block) or not runs_in_parts(x):
            return run(x, windows, table, *(scale if scale is None else scale.view(-1, 1, 1, 1) for scale in scales))
        table = block.attn.position_bias(*windows.largest)

        def run_part(tokens, part):
            token_scales = (s if s is None else s.index_select(0, part.images) for s in scales)  # (T, 1)
            return run(tokens, part, table, *token_scales)

        return map_windows(run_part, x, _parts(windows, x))


def draw_scales(drop_path: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Per-image scales of both residual branches of ``x (B, ...)``, (B, 1) each, or None if nothing is dropped."""
    if not is_plain(drop_path, DropPath):
        return drop_path(x.new_ones(x.shape[0], 1)), drop_path(x.new_ones(x.shape[0], 1))
    return drop_path.draw(x, 2) if drop_path.drops else (None, None)


def runs_in_parts(x: Tensor) -> bool:
    """Whether blocks run on the tokens of some windows at a time, and not on the whole map."""
    return x.device.type == 'cpu' and not has_any_size(x)


def _parts(windows, x):
    """Parts of the windows of ``x (B, H, W, C)``.

    A compiled graph unrolls them, so only inference on one image has several, of `COMPILED_PART_SIZE`: graphs for
    training are large, and a graph for more images should serve any number of them.
    """
    if torch.jit.is_tracing():
        return [windows]
    size = PART_SIZE
    if compat.is_compiling():
        if torch.is_grad_enabled() or x.shape[0] > 1 or not may_use_operators_in_graph():
            return [windows]
        size = COMPILED_PART_SIZE
    return windows.split(max(size // x.shape[3], 1), ONEDNN_ROWS)


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
            trained with, no larger than the map of that stage: (16, 16, 16, 8) for 256 pixels and window 16.
            Fine-tuning at other windows does not change it. None: what the checkpoint says, or ``window_size`` if there
            is no checkpoint.
        position_bias (str): log_cpb, the log-spaced continuous position bias. For comparison (the paper's Table 1)
            also linear_cpb, the same MLP on linear-spaced offsets, or parameterized, a learned table. The table is for
            ``window_size``, is resized bicubically when that changes, and takes no ``pretrained_window_sizes``.
        mlp_ratio (float): hidden dimension of the MLPs over their input dimension.
        qkv_bias (bool): whether queries and values have a bias.
        drop_rate (float): dropout in attention output and MLP.
        attn_drop_rate (float): dropout of attention weights.
        drop_path_rate (float): stochastic depth of the last block; it grows linearly from 0 at the first.
        out_indices (Sequence[int]): stages whose maps are returned, in increasing order. Later stages are not built.
        frozen_stages (int): -1 freezes nothing, 0 the patch embedding, n also the first n stages with their norms.
        with_cp (bool): activation checkpointing of every block in training: less memory, more time.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` loads weights, as
            `load_pretrained` does. It also takes ``allow_missing`` and ``prefix``. mmengine's ``map_location`` is
            accepted and has no effect: files are read onto the CPU.
        others: not accepted. If another implementation has such an argument, the error gives its name here.

    Raises:
        ValueError: an argument is out of its range; the message names it, its value and what would be right.
        TypeError: an argument is unknown; the message gives its name here if it has one.
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
        _check_position_bias(position_bias, pretrained_window_sizes)
        if frozen_stages not in range(-1, num_stages + 1):
            raise ValueError(f'frozen_stages must be -1 to {num_stages}, got {frozen_stages!r}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be at least 0 and less than 1, got {drop_path_rate!r}')
        windows = pretrained_windows = per_stage('window_size', window_size, num_stages)
        self.pretrained_windows_given = pretrained_window_sizes is not None
        if self.pretrained_windows_given:
            pretrained_windows = per_stage('pretrained_window_sizes', pretrained_window_sizes, num_stages)
        self.position_bias = position_bias
        self.out_indices = _check_out_indices(out_indices, num_stages)
        self.frozen_stages = frozen_stages
        num_built = self.out_indices[-1] + 1  # later stages would get no gradient

        self.patch_embed = PatchEmbed(in_channels, arch.embed_dims, patch_size)
        build_block = partial(
            Block,
            qkv_bias=qkv_bias,
            mlp_ratio=mlp_ratio,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            position_bias=position_bias,
        )
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(arch.depths), device='cpu').tolist())
        self.layers = nn.ModuleList()
        for i in range(num_built):
            embed_dims = arch.embed_dims * 2**i
            blocks = [
                build_block(
                    embed_dims=embed_dims,
                    num_heads=arch.num_heads[i],
                    pretrained_window=pretrained_windows[i],
                    drop_path=next(drop_paths),
                    extra_norm=has_extra_norm(arch, j),
                )
                for j in range(arch.depths[i])
            ]
            downsample = PatchMerging(embed_dims) if i + 1 < num_built else nn.Identity()
            self.layers.append(Stage(blocks, downsample, windows[i], with_cp))
            if i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm(embed_dims))
        # In the state dict, so that a fine-tuned checkpoint says which windows its position MLPs were trained with.
        self.register_buffer('pretrained_windows', torch.tensor(pretrained_windows[:num_built]))
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
                out = getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2)
                # `contiguous` would ask whether a side is 1, and so close it in an export for any size.
                outs.append(out.clone(memory_format=torch.contiguous_format))
        return tuple(outs)

    @property
    def window_size(self) -> tuple[int, ...]:
        """Window size in tokens, per stage that is built."""
        return tuple(stage.window_size for stage in self.layers)

    def set_window_size(self, window_size: int | Sequence[int]):
        """Attend in other windows from now on. Parameters and ``pretrained_window_sizes`` stay the same.

        With ``position_bias='parameterized'`` the tables are resized, which loses detail. Do it before an optimizer
        takes them.

        Args:
            window_size (int | Sequence[int]): window size in tokens, one for all stages or one per stage.

        Raises:
            ValueError: a window is smaller than one token, or there is neither one window nor one per stage.
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
        """The pretrained window per stage, in tokens; with parameterized tables, the window that they are for."""
        return tuple(stage.blocks[0].attn.position_bias.pretrained_window for stage in self.layers)

    def of_built_stages(self, values: Sequence) -> tuple | None:
        """The values of the built stages, given one value per built stage or per stage of the arch, else None."""
        built = len(self.layers)
        return tuple(values[:built]) if len(values) in (built, len(self.arch.depths)) else None

    def set_pretrained_window_sizes(self, windows: Sequence[int]):
        """Say which windows the position bias was trained with, one per stage that is built, in tokens."""
        for stage, window in zip(self.layers, windows):
            for block in stage.blocks:
                block.attn.position_bias.pretrained_window = window
        self.pretrained_windows.copy_(torch.tensor(windows))

    def init_weights(self):
        """Load the checkpoint that ``init_cfg`` names. Without one, the initialisation from scratch stays.

        Raises:
            CheckpointError: the checkpoint can't be read, or is not of this architecture.
        """
        if self.init_cfg is not None:
            load_pretrained(self, *self.pretrained_source())

    def pretrained_source(self) -> tuple[str, str | Sequence[str], str]:
        """The path or URL that ``init_cfg`` names, its ``allow_missing`` and its ``prefix``.

        Raises:
            ValueError: ``init_cfg`` has another form.
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
        loaded = convert_in_place(self, state_dict, prefix)
        own = self.pretrained_window_sizes
        if loaded is None and not self.pretrained_windows_given:
            warn(f'the state dict does not say the windows it was trained with: pretrained_window_sizes stays {own}')
        elif loaded is not None and loaded != own and self.pretrained_windows_given:
            warn(
                f'the checkpoint says pretrained_window_sizes={loaded}, the argument says {own}: '
                'the argument is used; if it is wrong, so is the position bias'
            )
        elif loaded is not None and loaded != own:
            self.set_pretrained_window_sizes(loaded)
        state_dict[f'{prefix}pretrained_windows'] = torch.tensor(self.pretrained_window_sizes, device='cpu')
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_position_bias(kind, pretrained_window_sizes):
    if kind not in list(POSITION_BIASES):
        raise ValueError(f'position_bias must be one of {", ".join(POSITION_BIASES)}, got {kind!r}')
    if pretrained_window_sizes is not None and not POSITION_BIASES[kind].has_pretrained_window:
        raise ValueError(
            f'pretrained_window_sizes is for a continuous position bias, and position_bias={kind!r} is a table of '
            f'window_size: leave it out, got {pretrained_window_sizes!r}'
        )


def _check_out_indices(out_indices, num_stages):
    indices = list(out_indices) if isinstance(out_indices, Sequence) else []
    if not indices or indices != sorted(set(indices) & set(range(num_stages))):
        raise ValueError(f'out_indices must be increasing stages from 0 to {num_stages - 1}, got {out_indices!r}')
    return tuple(indices)
