"""Linear layers of tokens: what `torch.nn.functional.linear` gives, in less time or memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def of_gelu(self, x: Tensor) -> Tensor:
        """``self(gelu(x))`` for ``x`` (T, in_features); it keeps ``x`` alone for backward, and computes the GELU again.

        Inductor decides by itself what to compute again. Hooks run for a call of the module alone, so that with any of
        them that is made.
        """
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or any(hooks):
            return self(F.gelu(x))
        return _GeluLinear.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; without gradients, in float32 on CPU, by oneDNN, as the code of Inductor does.

    PyTorch itself copies the bias over the output and calls MKL, which takes 1.05 to 1.2 times as long on the machine
    that docs/performance.md names.
    """
    if _suits_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


def _suits_onednn(x, weight, bias):
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    plain = all(t.device.type == 'cpu' and t.dtype == torch.float32 for t in (x, weight))
    return plain and torch.backends.mkldnn.is_available()


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        return grad_x, grad.mT @ F.gelu(x), grad.sum(0)
