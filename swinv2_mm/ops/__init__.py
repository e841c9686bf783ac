"""How attention inside windows is computed: one specification, and the faster paths beside it.

A path is a module with three functions: ``attention``, as `reference.attention`; ``unable``, why it can't serve a call,
or None; and ``is_worthwhile``, whether to take it where it can. Its ``ORDER`` says what it takes: tokens in window
order, with the groups of their windows, or the map, with `Windows`. A new path is one such file, listed in `PATHS`.
"""

from __future__ import annotations

import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ..messages import inform
from ..shortcuts import is_recorded
from ..windows import PaddedWindows, Windows, map_windows
from . import flash_cpu, flash_cuda, masked, reference, sdpa

PATHS = {path.__name__.rpartition('.')[2]: path for path in (flash_cuda, flash_cpu, sdpa, reference)}  # fastest first
VARIABLE = 'SWINV2_MM_ATTENTION'  # the environment variable that forces a path
forced = os.environ.get(VARIABLE)


def attention(
    qkv: Tensor, scale: Tensor, table: Tensor, windows: Windows | PaddedWindows, dropout: float = 0.0
) -> Tensor:
    """`reference.attention` through the fastest path that can serve the call.

    The environment variable ``SWINV2_MM_ATTENTION``, read when the package is imported, forces a path for comparison:
    ``reference``, ``sdpa``, ``flash_cpu`` or ``flash_cuda``. Padded windows, in an export for any size, have a path of
    their own.

    Args:
        qkv (Tensor): (B, H, W, 3 * heads * d) on the map, or (T, 3 * heads * d) in window order.
        scale (Tensor), table (Tensor), dropout (float): as in `reference.attention`.
        windows (Windows | PaddedWindows): the windows that hold these tokens.

    Returns:
        Tensor: (B, H, W, heads * d) or (T, heads * d), in the dtype and order of ``qkv``.

    Raises:
        ValueError: the forced path does not exist, or can't serve this call.
    """
    if isinstance(windows, PaddedWindows):
        return masked.attention(qkv, scale, table, windows, dropout)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, scale, table))
    head_dim = qkv.shape[-1] // (3 * table.shape[0])
    path = path_of(qkv.device, qkv.dtype, head_dim, dropout, needs_grad, on_map=qkv.ndim == 4)
    if path.ORDER == 'map':
        return path.attention(qkv, scale, table, windows, dropout)

    def attend(tokens, part):
        return path.attention(tokens, scale, table, part.groups, dropout)

    return map_windows(attend, qkv, [windows]) if qkv.ndim == 4 else attend(qkv, windows)


def path_of(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float = 0.0,
    needs_grad: bool = False,
    on_map: bool = True,
) -> ModuleType:
    """The path that serves such a call of `attention`: the forced one, or the fastest that can.

    Args:
        dtype (torch.dtype): of ``qkv``.
        head_dim (int): channels per head.
        on_map (bool): whether tokens come as a map.

    Raises:
        ValueError: the forced path does not exist, or can't serve this call.
    """

    def unable(path):
        needs_map = path.ORDER == 'map' and not on_map
        order = 'takes whole maps, and these are tokens of some windows: unset it' if needs_map else None
        return path.unable(device, dtype, head_dim, dropout) or order

    if not forced:
        path = next(path for path in PATHS.values() if not unable(path) and path.is_worthwhile(needs_grad))
        if device.type == 'cuda' and path is not flash_cuda and not is_recorded():
            _say_why_not(unable(flash_cuda) or 'is of no use here:', path.__name__.rpartition('.')[2])
        return path
    if forced not in PATHS:
        raise ValueError(f'unknown attention path {VARIABLE}={forced}: set one of {", ".join(PATHS)}, or unset it')
    if unable(PATHS[forced]):
        raise ValueError(f'{VARIABLE}={forced} {unable(PATHS[forced])}')
    return PATHS[forced]


@lru_cache(maxsize=None)
def _say_why_not(reason, path):
    """Log once why the fastest path on CUDA is not taken."""
    inform(f'attention on this GPU runs through {path}, which is slower: flash_cuda {reason.rpartition(":")[0]}')
