"""The published sizes of Swin Transformer V2, and checks of the arguments that say widths, depths and windows."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np

MAX_WINDOW = 2**16 - 1  # tokens


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
    """Look an arch up by its name, or make one from a dict of its fields.

    Args:
        arch (str | dict): a name in `ARCHS`, or the fields of `Arch`.

    Returns:
        Arch: with tuples for its sequences.

    Raises:
        ValueError: arch is invalid; the message says why.
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
    """The inverse of `parse_arch`: the name of an arch if it has one, else a dict of its fields."""
    names = [name for name, known in ARCHS.items() if known == arch]
    return names[0] if names else {field: value for field, value in arch._asdict().items() if value != 0}


def has_extra_norm(arch: Arch, block: int) -> bool:
    """Whether a LayerNorm on the main branch ends a block; ``block`` is the index of the block in its stage."""
    every = arch.extra_norm_every_n_blocks
    return every > 0 and (block + 1) % every == 0


def per_stage(name: str, sizes: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Expand window sizes to one per stage.

    Args:
        name (str): the argument or flag, for messages.
        sizes (int | Sequence[int]): window sizes in tokens: an int or a sequence of one int for all stages, or one
            int per stage.
        num_stages (int): number of stages.

    Returns:
        tuple[int]: one per stage.

    Raises:
        ValueError: there is neither one size nor one per stage, or a size is not a whole number from 1 to `MAX_WINDOW`.
    """
    given = tuple(sizes) if isinstance(sizes, (Sequence, np.ndarray)) else (sizes,)
    if len(given) not in (1, num_stages):
        raise ValueError(f'{name} must be an int or {num_stages} ints, one per stage, got {sizes!r}')
    if not all(isinstance(size, Integral) and 1 <= size <= MAX_WINDOW for size in given):
        raise ValueError(f'{name} must be ints of at least 1 token and at most {MAX_WINDOW}, got {sizes!r}')
    return tuple(int(size) for size in (given if len(given) == num_stages else given * num_stages))
