"""How attention inside windows is computed: one specification, and the faster paths beside it.

A path is a module with three functions: ``attention``, as `reference.attention`; ``unable``, why it can't serve a call,
or None; and ``is_worthwhile``, whether to take it where it can. A new path is one such file, listed in `PATHS`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..windows import Windows, map_windows
from . import flash_cpu, reference, sdpa

PATHS = {path.__name__.rpartition('.')[2]: path for path in (flash_cpu, sdpa, reference)}  # the fastest first
VARIABLE = 'SWINV2_MM_ATTENTION'  # the environment variable that forces a path
forced = os.environ.get(VARIABLE)


def attention(qkv: Tensor, scale: Tensor, table: Tensor, windows: Windows, dropout: float = 0.0) -> Tensor:
    """`reference.attention` through the fastest path that can serve the call.

    The environment variable ``SWINV2_MM_ATTENTION``, read when the package is imported, forces a path for comparison:
    ``reference``, ``sdpa`` or ``flash_cpu``.

    Args:
        qkv (Tensor): (B, H, W, 3 * heads * d) on the map, or (T, 3 * heads * d) in window order.
        scale (Tensor), table (Tensor), dropout (float): as in `reference.attention`.
        windows (Windows): the windows that hold these tokens.

    Returns:
        Tensor: (B, H, W, heads * d) or (T, heads * d), in the dtype and order of ``qkv``.

    Raises:
        ValueError: the forced path does not exist, or can't serve this call.
    """
    if qkv.ndim == 4:
        return map_windows(lambda tokens, part: attention(tokens, scale, table, part, dropout), qkv, [windows])
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, scale, table))
    path = _forced_path(qkv, dropout) if forced else _fastest_path(qkv, dropout, needs_grad)
    return path.attention(qkv, scale, table, windows.groups, dropout)


def _fastest_path(qkv, dropout, needs_grad):
    return next(path for path in PATHS.values() if not path.unable(qkv, dropout) and path.is_worthwhile(needs_grad))


def _forced_path(qkv, dropout):
    if forced not in PATHS:
        raise ValueError(f'unknown attention path {VARIABLE}={forced}: set one of {", ".join(PATHS)}, or unset it')
    reason = PATHS[forced].unable(qkv, dropout)
    if reason:
        raise ValueError(f'{VARIABLE}={forced} {reason}')
    return PATHS[forced]
