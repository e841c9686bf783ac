"""What tells one Swin Transformer V2 from another, and which parameters it has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .position_bias import CPB_HIDDEN_DIMS, POSITION_BIASES


class Arch(NamedTuple):
    """Widths and depths (paper, section 4.1; head dimension 32 throughout)."""

    embed_dims: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    extra_norm_every_n_blocks: int = 0


ARCHS = {
    'tiny': Arch(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    'small': Arch(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    'base': Arch(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    'large': Arch(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    'huge': Arch(352, (2, 2, 18, 2), (11, 22, 44, 88), 6),
    'giant': Arch(512, (2, 2, 42, 4), (16, 32, 64, 128), 6),
}


def parse_arch(arch: str | dict) -> Arch:
    """The arch that a name or a dict of its fields stands for.

    Raises:
        ValueError: there is no such name, or the dict describes no Swin Transformer V2.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch must be one of {", ".join(ARCHS)} or a dict, got {arch!r}')
        return ARCHS[arch]
    fields, optional = set(Arch._fields), set(Arch._field_defaults)
    if not isinstance(arch, dict) or not fields - optional <= set(arch) <= fields:
        raise ValueError(f'arch must be a name or a dict with {", ".join(Arch._fields)}, got {arch!r}')
    arch = Arch(**arch)
    for field in ('depths', 'num_heads'):
        if not isinstance(getattr(arch, field), Sequence):
            raise ValueError(f'{field} of arch must be one int per stage, got {getattr(arch, field)!r}')
    arch = arch._replace(depths=tuple(arch.depths), num_heads=tuple(arch.num_heads))
    if not all(depth >= 1 for depth in arch.depths):
        raise ValueError(f'depths of arch must be at least 1, got {arch.depths!r}')
    if len(arch.depths) != len(arch.num_heads):
        raise ValueError(f'arch needs as many depths as num_heads, got {arch.depths!r} and {arch.num_heads!r}')
    for i, num_heads in enumerate(arch.num_heads):
        if not 1 <= num_heads <= arch.embed_dims * 2**i or arch.embed_dims * 2**i % num_heads:
            raise ValueError(
                f'stage {i} of arch has {arch.embed_dims * 2**i} channels, not divisible by {num_heads} heads'
            )
    return arch


def arch_argument(arch: Arch) -> str | dict:
    """What `parse_arch` makes an arch of: its name if it has one."""
    names = [name for name, known in ARCHS.items() if known == arch]
    return names[0] if names else {field: value for field, value in arch._asdict().items() if value != 0}


def has_extra_norm(arch: Arch, block: int) -> bool:
    """Whether a LayerNorm on the main branch ends the block of this index in its stage."""
    every = arch.extra_norm_every_n_blocks
    return every > 0 and (block + 1) % every == 0


def parameter_shapes(
    arch: str | dict = 'tiny',
    in_channels: int = 3,
    patch_size: int = 4,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    position_bias: str = 'log_cpb',
    window_size: tuple[int, ...] = (),
) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a backbone but its output norms, by name, without building it.

    Args:
        arch, in_channels, patch_size, mlp_ratio, qkv_bias, position_bias: as in `SwinTransformerV2`.
        window_size (tuple[int]): one per stage; needed for a parameterized position bias alone.

    Raises:
        ValueError: arch is none.
    """
    arch = parse_arch(arch)
    shapes = {}

    def linear(name, inputs, outputs, bias=True):
        shapes[f'{name}.weight'] = (outputs, inputs)
        if bias:
            shapes[f'{name}.bias'] = (outputs,)

    def norm(name, channels):
        shapes[f'{name}.weight'] = shapes[f'{name}.bias'] = (channels,)

    shapes['patch_embed.proj.weight'] = (arch.embed_dims, in_channels, patch_size, patch_size)
    shapes['patch_embed.proj.bias'] = (arch.embed_dims,)
    norm('patch_embed.norm', arch.embed_dims)
    for i, (depth, num_heads) in enumerate(zip(arch.depths, arch.num_heads)):
        channels = arch.embed_dims * 2**i
        for j in range(depth):
            block = f'layers.{i}.blocks.{j}'
            linear(f'{block}.attn.qkv', channels, 3 * channels, bias=False)
            if qkv_bias:
                shapes[f'{block}.attn.q_bias'] = shapes[f'{block}.attn.v_bias'] = (channels,)
            shapes[f'{block}.attn.logit_scale'] = (num_heads, 1, 1)
            bias = f'{block}.attn.{POSITION_BIASES[position_bias].name}'
            if position_bias == 'parameterized':
                shapes[f'{bias}.weight'] = ((2 * window_size[i] - 1) ** 2, num_heads)
            else:
                linear(f'{bias}.0', 2, CPB_HIDDEN_DIMS)
                linear(f'{bias}.2', CPB_HIDDEN_DIMS, num_heads, bias=False)
            linear(f'{block}.attn.proj', channels, channels)
            norm(f'{block}.norm1', channels)
            linear(f'{block}.mlp.fc1', channels, int(mlp_ratio * channels))
            linear(f'{block}.mlp.fc2', int(mlp_ratio * channels), channels)
            norm(f'{block}.norm2', channels)
            if has_extra_norm(arch, j):
                norm(f'{block}.norm3', channels)
        if i + 1 < len(arch.depths):
            linear(f'layers.{i}.downsample.reduction', 4 * channels, 2 * channels, bias=False)
            norm(f'layers.{i}.downsample.norm', 2 * channels)
    return shapes


def infer_arguments(weights: Mapping[str, Tensor]) -> dict | None:
    """The arguments of the `SwinTransformerV2` that weights in our names belong to.

    Returns:
        dict: ``arch``, the name if it has one, ``in_channels``, ``patch_size``, ``mlp_ratio``, ``qkv_bias`` and
        ``position_bias``. None if a weight that tells one of them is missing, or they are those of no backbone.
    """
    blocks = {(int(m[1]), int(m[2])) for name in weights if (m := re.match(r'layers\.(\d+)\.blocks\.(\d+)\.', name))}
    stages = range(1 + max((stage for stage, _ in blocks), default=-1))
    first = 'layers.0.blocks.0.'
    holders = {m[1] for name in weights if (m := re.match(rf'{re.escape(first)}attn\.(\w+)', name))}
    try:
        embed_dims, in_channels, patch_size, _ = weights['patch_embed.proj.weight'].shape
        arch = Arch(
            embed_dims,
            tuple(1 + max(block for stage, block in blocks if stage == i) for i in stages),
            tuple(weights[f'layers.{i}.blocks.0.attn.logit_scale'].shape[0] for i in stages),
            min((j + 1 for i, j in blocks if f'layers.{i}.blocks.{j}.norm3.weight' in weights), default=0),
        )
        hidden, channels = weights[f'layers.{stages[-1]}.blocks.0.mlp.fc1.weight'].shape  # the widest: least rounded
        mlp_ratio = hidden / channels
        if int(mlp_ratio * channels) < hidden:  # by the error of the division
            mlp_ratio = float(np.nextafter(mlp_ratio, np.inf))
        position_bias = next(kind for kind, bias in POSITION_BIASES.items() if bias.name in holders)
        parse_arch(arch._asdict())
        if sum(arch.depths) > len(weights):  # a name of a block that is not there
            return None
    except (KeyError, ValueError, IndexError, StopIteration, ZeroDivisionError):
        return None
    return dict(
        arch=arch_argument(arch),
        in_channels=in_channels,
        patch_size=patch_size,
        mlp_ratio=mlp_ratio,
        qkv_bias=f'{first}attn.q_bias' in weights,
        position_bias=position_bias,
    )
