"""Linear layers for tokens: `torch.nn.functional.linear`, by oneDNN where that is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; for inference in float32 on CPU by oneDNN, as the code of Inductor does.

    PyTorch itself copies the bias over the output and calls MKL, which takes 1.05 to 1.2 times as long on the machine
    that docs/performance.md names.
    """
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if needs_grad or not (_plain(x) and _plain(weight)) or torch.is_autocast_enabled('cpu') or _traced():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


def _plain(x):
    return x.device.type == 'cpu' and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _traced():
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
