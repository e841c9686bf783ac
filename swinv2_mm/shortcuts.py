"""When a shortcut may be taken: weights read instead of a layer called, results kept, operators of our own.

Hooks, compilers, tracers, counters of operators and the transforms of torch.func all have to see what PyTorch would do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import compat

PLAIN = Tensor, nn.Parameter  # the types of tensors that are just what they hold
FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Dropout, nn.ReLU)}


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class says and no more, so that its weights may be read instead.

    A module of another class or a subclass, with a hook of its own or of all modules, or with another ``forward`` than
    PyTorch gave it is called.
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


def may_keep() -> bool:
    """Whether a result may be kept for another call, and operators be used that others do not know.

    Not where tensors may be no real ones, or every operator is recorded, counted or transformed.
    """
    return not (is_traced() or _get_current_dispatch_mode() is not None)


def is_traced() -> bool:
    """Whether operators become a graph, or a transform of torch.func or forward-mode differentiation acts on them."""
    return compat.is_compiling() or torch.jit.is_tracing() or is_transforming()


def is_transforming() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, acts on the operators."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def may_use_functions() -> bool:
    """Whether functions with a gradient of their own may be used. `torch.compile` knows them, exporters do not."""
    return not (torch.jit.is_tracing() or compat.is_exporting() or is_transforming())
