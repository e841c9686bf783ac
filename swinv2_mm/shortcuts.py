"""Whether operators are recorded, and so which shortcuts may be taken and whether a size is open.

Shortcuts are reading weights instead of calling a layer, keeping results, and using our own operators. Hooks,
compilers, tracers, counters of operators and the transforms of torch.func must see what PyTorch itself would do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, wraps
from operator import index

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import compat

PLAIN = Tensor, nn.Parameter  # types of tensors without behaviour of their own
FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Dropout, nn.ReLU)}


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class says and no more, so that its weights may be read instead.

    A module is not plain, and has to be called, if it is of another class or a subclass, is a wrapper, has hooks (its
    own or global ones), or has a replaced ``forward``.
    """
    if type(module) is not kind or 'forward' in vars(module) or kind.forward is not FORWARDS.get(kind, kind.forward):
        return False
    return not _has_hooks(module)


def _has_hooks(module):
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_recorded() -> bool:
    """Whether operators are traced, counted or transformed, and tensors may be fake tensors."""
    return is_traced() or _get_current_dispatch_mode() is not None


def is_traced() -> bool:
    """Whether operators become a graph, or torch.func or forward-mode differentiation transforms them."""
    return compat.is_compiling() or torch.jit.is_tracing() or is_transforming()


def is_transforming() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, acts on the operators."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def side(size: int) -> int:
    """A side of a map as a plain int, so that each size has its own graph; symbolic in an export for any size."""
    return size if is_symbolic(size) else index(size)


def has_any_size(x: Tensor) -> bool:
    """Whether a map (B, H, W, C) is of a graph that is exported for any size."""
    return any(map(is_symbolic, x.shape[1:3]))


def is_symbolic(size: int) -> bool:
    """Whether a size is open in an export."""
    return compat.is_exporting() and isinstance(size, torch.SymInt)


def may_use_functions() -> bool:
    """Whether a `torch.autograd.Function` may be used. `torch.compile` supports them, exporters do not."""
    return not (torch.jit.is_tracing() or compat.is_exporting() or is_transforming())


def may_use_operators_in_graph() -> bool:
    """Whether a graph that is being compiled may hold operators of ours. An exported one may not."""
    return compat.CAN_TELL_EXPORTING and may_use_functions()


def cached(function: Callable) -> Callable:
    """Keep the last 16 results of a function of plain values, but not while operators are recorded."""

    @lru_cache(maxsize=16)
    def kept(*args):
        with torch.inference_mode(False):  # a later forward pass may need gradients
            return function(*args)

    @wraps(function)
    def call(*args):
        return (function if is_recorded() else kept)(*args)

    return call


class LastResult:
    """The last result of a function of CPU tensors, kept for as long as their values stay equal.

    Values are compared, because weights may change without a trace: fused optimizers, averaged weights, ``p.data``. On
    a GPU the comparison would wait for the device. Copies and pickles of it are empty.
    """

    def __init__(self):
        self._last = None, (), None  # one attribute, so that threads never see half of an update

    def get(self, compute: Callable[[], Tensor], key: Hashable, tensors: Sequence[Tensor]) -> Tensor:
        """``compute()``, or a copy of what it gave last if ``key`` and the values of ``tensors`` are the same.

        It is always computed if operators are recorded, a gradient is needed, or a tensor is not a plain CPU tensor.
        """
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if needs_grad or is_recorded() or not all(type(x) in PLAIN and x.device.type == 'cpu' for x in tensors):
            return compute()
        last_key, last_tensors, result = self._last
        if last_key != key or not all(map(_equal, last_tensors, tensors)):
            with torch.inference_mode(False), torch.no_grad():
                copies = [x.detach().clone() for x in tensors]
                result = compute()
                self._last = key, copies, result
        return result.clone()  # a hook may change it in place

    def __reduce__(self):
        return LastResult, ()


def _equal(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)
