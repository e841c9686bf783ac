"""Differences between versions of PyTorch: every branch on the version is here, and versions too old are refused."""

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

# The newest 2.x that this PyTorch is at least. Comparing `torch.__version__` itself takes 20 us or more at every call.
torch_version = max((2, minor) for minor in range(50) if torch.__version__ >= (2, minor))
ACCURATE_WITH_BIAS = {'cuda': (2, 1), 'cpu': (2, 5)}  # first versions whose kernels do not round logits
HAS_ONEDNN_LINEAR = torch_version >= (2, 1)  # before, only with another operator fused to it
HAS_CUSTOM_OP = torch_version >= (2, 4)
CAN_TELL_EXPORTING = torch_version >= (2, 7)  # from compiling

# PyTorch's own function objects, because its compiler recognises them by identity.
is_compiling = torch.compiler.is_compiling if torch_version >= (2, 3) else torch._utils.is_compiling
is_exporting = getattr(getattr(torch, 'compiler', None), 'is_exporting', bool)  # from 2.7 on


def constant_in_graphs(function):
    """Have compilers call a function and take its result for a constant: `torch.compiler.assume_constant_result`.

    That itself imports the compiler, which takes half a second.
    """
    function._dynamo_marked_constant = True
    return function


@contextmanager
def open_sizes():
    """A context in which an export does not take a size of 1, in its example or on the way, for a constant."""
    from torch.fx.experimental import _config

    if not hasattr(_config, 'backed_size_oblivious'):
        raise ValueError(f'a graph for any size needs a newer PyTorch, and this environment has {torch.__version__}')
    with _config.patch(backed_size_oblivious=True):
        yield


def require(version: tuple[int, int], purpose: str) -> None:
    """Raise a ValueError unless PyTorch is at least ``version``, such as (2, 7)."""
    if torch.__version__ < version:
        needed = '.'.join(map(str, version))
        raise ValueError(f'{purpose} needs PyTorch {needed} or later, and this environment has {torch.__version__}')


def is_autocast_on_cpu() -> bool:
    """Whether autocast is on for CPU."""
    if torch_version >= (2, 4):
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()


def may_use_tf32() -> bool:
    """Whether matrix products of float32 on CUDA are set to the precision of TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # where it has been set, reading the older name is an error
        return matmul.fp32_precision == 'tf32'
    return matmul.allow_tf32


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with a tensor: its own, or that of autocast, which never casts float64."""
    kind = x.device.type
    if x.dtype == torch.float64:
        return x.dtype
    if torch_version >= (2, 4):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else x.dtype
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else x.dtype


@contextmanager
def without_cast_cache():
    """A context in which autocast caches no cast of a weight.

    Up to 2.8 it also caches casts made without gradients, as in the forward pass of a `torch.autograd.Function`. Later
    it reuses them where a gradient is needed, and the weight gets none.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def kernels_with_bias():
    """A context in which `attention_with_bias` avoids the CUDA kernels that are wrong with a bias.

    cuDNN's kernel has given wrong results for a bias with bfloat16 queries, and NaN gradients (pytorch issues 191612
    and 196678). The flash kernels take no bias.
    """
    if torch_version >= (2, 3):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return torch.backends.cuda.sdp_kernel(enable_flash=False)


def attention_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``softmax(q k + bias) v`` through `scaled_dot_product_attention`, with logits and softmax in float32 or wider.

    Older versions round logits to the dtype of the operands where they have no kernel for a bias, or none for its
    gradient. There the formula is used.

    Args:
        q (Tensor), k (Tensor), v (Tensor): (windows, heads, N, d).
        bias (Tensor): (1, heads, N, N), in the dtype of these.

    Returns:
        Tensor: (windows, heads, N, d), in that dtype.
    """
    if torch_version < ACCURATE_WITH_BIAS.get(q.device.type, (2, 1)):
        wide = torch.promote_types(v.dtype, torch.float32)
        return torch.softmax(q.to(wide) @ k.to(wide).mT + bias, -1).to(v.dtype) @ v
    if torch_version < (2, 2):  # 2.1 on CUDA takes wrong elements of what is not contiguous (pytorch issue 112577)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_with_dense_rows(bias), scale=1.0)


def flash_attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`attention_with_bias` on CPU without gradients: calls the flash kernel directly, which saves the dispatch."""
    if torch_version < (2, 3):  # the kernel takes no bias
        return attention_with_bias(q, k, v, bias)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, attn_mask=_with_dense_rows(bias), scale=1.0)[0]


def _with_dense_rows(bias):
    """The same bias with a last stride of 1: before 2.8 the CPU kernels read wrong elements with any other stride."""
    return bias if bias.stride(-1) == 1 else bias.contiguous()


def custom_op(name: str, schema: str):
    """Make a function of CPU tensors an operator that compilers do not look into, as `torch.library.custom_op` does.

    The schema is spelled out, because Python before 3.9 can't evaluate the annotations, and PyTorch 2.6 does not know
    `collections.abc.Sequence`.
    """
    if HAS_CUSTOM_OP:
        return torch.library.custom_op(name, mutates_args=(), device_types='cpu', schema=schema)
    return _Operator


def operator(name: str, schema: str, fake):
    """Make a function of tensors on any device an operator without derivatives, which compilers do not look into.

    It takes less CPU time per call than `custom_op`, and costs nothing before 2.4: there the function stays as it is.

    Args:
        fake (Callable): gives outputs of the right shapes, without computing them.
    """

    def register(function):
        if not HAS_CUSTOM_OP:
            return function
        torch.library.define(name, schema)
        torch.library.impl(name, 'default', function)
        torch.library.register_fake(name, fake)
        return getattr(getattr(torch.ops, name.partition('::')[0]), name.partition('::')[2]).default

    return register


class _Operator:
    """A `torch.autograd.Function` that stands in for a custom operator before 2.4."""

    def __init__(self, function):
        self._call = self._function = function

    def __call__(self, *args):
        return self._call(*args)

    def register_fake(self, function):
        return function  # compilers get another attention path

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
