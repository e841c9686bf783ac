"""How attention inside windows is computed: one specification and the faster paths beside it."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..windows import WindowGroup
from . import flash, reference, sdpa

PATHS = {path.__name__.rpartition('.')[2]: path.attention for path in (reference, sdpa, flash)}
VARIABLE = 'SWINV2_MM_ATTENTION'  # the environment variable that forces a path
forced = os.environ.get(VARIABLE)


def attention(qkv: Tensor, scale: Tensor, table: Tensor, groups: Sequence[WindowGroup], dropout: float = 0.0) -> Tensor:
    """`reference.attention` by the fastest path that has what the call needs; arguments and returns are the same.

    The environment variable ``SWINV2_MM_ATTENTION`` forces one, for comparison: ``reference``, ``sdpa`` or ``flash``.

    Raises:
        ValueError: a path is forced that does not exist or has no dropout.
    """
    path = forced or _fastest(qkv, scale, table, dropout)
    if path not in PATHS:
        raise ValueError(f'{VARIABLE}={path} is no path: set it to one of {", ".join(PATHS)}, or unset it')
    if path == 'reference':
        return reference.attention(qkv, scale, table, groups, dropout)
    if dropout > 0:
        raise ValueError(f'{VARIABLE}={path} has no dropout of attention weights: unset it, or set attn_drop_rate=0')
    return PATHS[path](qkv, scale, table, groups)


def _fastest(qkv, scale, table, dropout):
    if dropout > 0:
        return 'reference'
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, scale, table))
    # Without gradients a compiler does more with PyTorch's own operators, and an exported graph should have no others.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return 'flash' if qkv.device.type == 'cpu' and (needs_grad or not traced) else 'sdpa'
