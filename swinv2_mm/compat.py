"""What differs between versions of PyTorch: every branch by version is here, and what is too old is refused."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

if not hasattr(torch, 'compile'):  # came with 2.0
    raise ImportError(
        f'swinv2_mm needs PyTorch 2.0 or later, and this environment has {torch.__version__}: install it with the mmcv '
        'that was built for it, for example torch==2.1.2 with mmcv==2.1.0'
    )

ACCURATE_WITH_BIAS = {'cuda': (2, 1), 'cpu': (2, 5)}  # the first whose kernels round no logits
HAS_ONEDNN_LINEAR = torch.__version__ >= (2, 1)  # before, it knows a linear layer only with something fused to it
HAS_CUSTOM_OP = torch.__version__ >= (2, 4)

# The very functions of PyTorch, because its compiler knows them by identity.
is_compiling = torch.compiler.is_compiling if torch.__version__ >= (2, 3) else torch._utils.is_compiling
is_exporting = getattr(getattr(torch, 'compiler', None), 'is_exporting', bool)  # from 2.7 on


def require(version: tuple[int, int], purpose: str) -> None:
    """Raise a ValueError, of one line, unless PyTorch has a version, such as (2, 7)."""
    if torch.__version__ < version:
        needed = '.'.join(map(str, version))
        raise ValueError(f'{purpose} needs PyTorch {needed} or later, and this environment has {torch.__version__}')


def is_autocast_on_cpu() -> bool:
    """Whether autocast is on for CPU."""
    if torch.__version__ >= (2, 4):
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()


@contextmanager
def casts_not_kept():
    """A context in which autocast keeps no cast of a weight.

    Up to 2.8 it keeps casts that were made without gradients too, as in the forward pass of a function with a gradient
    of its own, and uses them afterwards where a gradient is needed, which the weight then does not get.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def kernels_with_bias():
    """A context in which `attention_with_bias` takes none of the CUDA kernels that are wrong with a bias.

    cuDNN's has given wrong results for a bias beside bfloat16 queries, and NaN gradients (pytorch issues 191612 and
    196678). The flash kernels take no bias.
    """
    if torch.__version__ >= (2, 3):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return torch.backends.cuda.sdp_kernel(enable_flash=False)


def attention_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``softmax(q k + bias) v`` by `scaled_dot_product_attention`, with logits and softmax in float32 or wider.

    Where PyTorch has no kernel for a bias, or none with its gradient, it rounds logits to the dtype of its operands in
    older versions; there the formula is used.

    Args:
        q (Tensor), k (Tensor), v (Tensor): (windows, heads, N, d).
        bias (Tensor): (1, heads, N, N), in the dtype of these.

    Returns:
        Tensor: (windows, heads, N, d), in that dtype.
    """
    if torch.__version__ < ACCURATE_WITH_BIAS.get(q.device.type, (2, 1)):
        wide = torch.promote_types(v.dtype, torch.float32)
        return torch.softmax(q.to(wide) @ k.to(wide).mT + bias, -1).to(v.dtype) @ v
    if torch.__version__ < (2, 2):  # 2.1 on CUDA takes wrong elements of what is not contiguous (pytorch issue 112577)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_with_dense_rows(bias), scale=1.0)


def flash_attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`attention_with_bias` on CPU without gradients, by the flash kernel itself: nothing is chosen at every call."""
    if torch.__version__ < (2, 3):  # it takes no bias
        return attention_with_bias(q, k, v, bias)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, attn_mask=_with_dense_rows(bias), scale=1.0)[0]


def _with_dense_rows(bias):
    """The same bias with a last stride of 1: of another the kernels for CPU read wrong elements before 2.8."""
    return bias if bias.stride(-1) == 1 else bias.contiguous()


def custom_op(name: str, schema: str):
    """Make a function of CPU tensors an operator that compilers take as it is, as `torch.library.custom_op` does.

    The schema is spelled out because Python before 3.9 can't evaluate the annotations, and 2.6 does not know
    the Sequence of `collections.abc`.
    """
    if HAS_CUSTOM_OP:
        return torch.library.custom_op(name, mutates_args=(), device_types='cpu', schema=schema)
    return _Operator


class _Operator:
    """A function with a gradient of its own: what stands in for a custom operator before 2.4."""

    def __init__(self, function):
        self._call = self._function = function

    def __call__(self, *args):
        return self._call(*args)

    def register_fake(self, function):
        return function  # for compilers, which get another path of attention

    def register_autograd(self, backward, *, setup_context=None):
        function = self._function

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                output = function(*args)
                if setup_context:
                    setup_context(ctx, args, output)
                return output

        Function.backward = staticmethod(backward)
        self._call = Function.apply
