"""How attention inside windows is computed: one specification and the faster paths beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import compat
from ..shortcuts import is_transforming, may_keep, may_use_functions
from ..windows import WindowGroup
from . import flash_cpu, reference, sdpa

PATHS = {path.__name__.rpartition('.')[2]: path.attention for path in (reference, sdpa, flash_cpu)}
VARIABLE = 'SWINV2_MM_ATTENTION'  # the environment variable that forces a path
forced = os.environ.get(VARIABLE)


def attention(qkv: Tensor, scale: Tensor, table: Tensor, groups: Sequence[WindowGroup], dropout: float = 0.0) -> Tensor:
    """`reference.attention` by the fastest path that has what the call needs; arguments and returns are the same.

    The environment variable ``SWINV2_MM_ATTENTION``, read when the package is imported, forces one for comparison:
    ``reference``, ``sdpa`` or ``flash_cpu``.

    Raises:
        ValueError: a path is forced that does not exist, or that can't do this.
    """
    path = forced or _fastest(qkv, scale, table, dropout)
    if path not in PATHS:
        raise ValueError(f'{VARIABLE}={path} is no path: set it to one of {", ".join(PATHS)}, or unset it')
    if path == 'reference':
        return reference.attention(qkv, scale, table, groups, dropout)
    if dropout > 0:
        raise ValueError(f'{VARIABLE}={path} has no dropout of attention weights: unset it, or set attn_drop_rate=0')
    if path == 'flash_cpu' and is_transforming():
        raise ValueError(f'{VARIABLE}=flash_cpu has no derivatives of torch.func and of forward mode: unset it')
    if path == 'flash_cpu' and qkv.device.type != 'cpu':
        raise ValueError(
            f'{VARIABLE}=flash_cpu is for CPU, and the tensors are on {qkv.device}: unset it, or set it to sdpa'
        )
    return PATHS[path](qkv, scale, table, groups)


def _fastest(qkv, scale, table, dropout):
    if dropout > 0:
        return 'reference'
    if is_transforming():
        return 'reference'  # whose operators all have derivatives of every kind
    if qkv.device.type != 'cpu' or not may_use_functions():
        return 'sdpa'  # an exported graph should have PyTorch's operators alone
    if not (may_keep() or compat.is_compiling() or compat.HAS_CUSTOM_OP):
        return 'sdpa'  # for what counts operators
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, scale, table))
    # Without gradients a compiler does more with PyTorch's operators than around an opaque one.
    return 'sdpa' if compat.is_compiling() and not (needs_grad and compat.HAS_CUSTOM_OP) else 'flash_cpu'
