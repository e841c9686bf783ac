"""Linear layers of tokens: what `torch.nn.functional.linear` gives, in less time or memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def of_gelu(self, x: Tensor) -> Tensor:
        """``self(gelu(x))`` that keeps ``x`` alone for backward, and computes the GELU again there.

        Hooks run for a call of the module alone, so with any of them that is made; and a compiler decides by itself
        what to compute again.

        Args:
            x (Tensor): (..., in_features).

        Returns:
            Tensor: (..., out_features).
        """
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        if not torch.is_grad_enabled() or _traced() or any(hooks):
            return self(F.gelu(x))
        return _GeluLinear.apply(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; without gradients, in float32 on CPU, by oneDNN, as the code of Inductor does.

    PyTorch itself copies the bias over the output and calls MKL, which takes 1.05 to 1.2 times as long on the machine
    that docs/performance.md names.
    """
    if _suits_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


def _suits_onednn(x, weight, bias):
    if _traced() or torch.is_autocast_enabled('cpu'):
        return False
    tensors = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 for t in tensors)
    return plain and x.device.type == 'cpu' and torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def _traced():
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class _GeluLinear(torch.autograd.Function):
    """Under autocast everything but the gradients of weight and bias is in the half precision of the output."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        if needs_weight:
            activated = F.gelu(x).to(grad.dtype).reshape(-1, x.shape[-1])
            grad_weight = (grad.reshape(-1, grad.shape[-1]).mT @ activated).to(weight.dtype)
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias
