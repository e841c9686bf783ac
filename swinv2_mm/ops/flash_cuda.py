"""Attention inside windows on CUDA, over all windows of a map in one launch of a Triton kernel.

Forward and backward read the map in its natural order. Backward computes the attention weights again, as FlashAttention
does (arXiv 2205.14135). Only ``qkv``, the output and one number per token and head are kept between the two, and no sum
depends on the order in which threads happen to run, so results are the same in every run.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from .. import compat
from ..messages import first_line
from ..shortcuts import is_transforming, may_use_functions
from ..windows import Windows, map_windows, partition
from . import reference
from .common import NO_DROPOUT

ORDER = 'map'
DEVICE = 'cuda'  # tests set it to cpu, for Triton's interpreter
HEAD_DIMS = (16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # Ampere, the first with matrix products of bfloat16
PROGRAMS = 1024  # that sum up the gradient of the bias, about
SCRATCH = 2**27  # bytes for sums over pairs of tokens, of as many heads at a time as fit, or of one
TRIAL = 2, 24, 40, 24, 12  # batch, height, width, window and shift of a map that shows whether the kernels work
TOLERANCE = 0.02  # of it, several times what the rounding of half precision gives
FOLD = dict(OFFSETS=64, QUERIES=64, enable_fp_fusion=True)  # of the kernel that sums up pairs of tokens


class Tile(NamedTuple):
    """How many tokens a program owns, how many it takes at a time, and how it is compiled."""

    block: int
    inner: int
    num_warps: int
    num_stages: int


# For up to 32 and for 64 channels per head, in half precision and in float32. At compute capability 8.0 and 9.0 none
# spills more than four registers (tests/test_flash_cuda.py). `key` may not take more at a time than theirs hold.
TILES = {
    'forward': {16: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)), 32: (Tile(64, 32, 4, 3), Tile(32, 32, 4, 3))},
    'query': {16: (Tile(64, 64, 4, 3), Tile(64, 32, 8, 3)), 32: (Tile(64, 32, 4, 3), Tile(16, 32, 4, 3))},
    'key': {16: (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)), 32: (Tile(32, 16, 4, 3), Tile(32, 16, 4, 3))},
    'pair': {16: (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)), 32: (Tile(32, 32, 4, 2), Tile(16, 16, 4, 2))},
}


def tile_of(kernel: str, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile of a kernel."""
    return TILES[kernel][dtype.itemsize * 8][head_dim > 32]


def attention(qkv: Tensor, scale: Tensor, table: Tensor, windows: Windows, dropout: float = 0.0) -> Tensor:
    """As `reference.attention` without dropout, once differentiable, on a map.

    Args:
        qkv (Tensor): (B, H, W, 3 * heads * d) in float32, bfloat16 or float16.
        scale (Tensor): (heads, 1, 1), used in float32.
        table (Tensor): (heads, 2H-1, 2W-1), used in float32.
        windows (Windows): all windows of the map.

    Returns:
        Tensor: (B, H, W, heads * d).
    """
    return _Attention.apply(qkv, scale.float(), table.float(), windows.window, windows.shift)


def unable(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> str | None:
    """Why this path can't serve a call, or None."""
    if dropout > 0:
        return NO_DROPOUT
    if is_transforming():
        return 'does not support torch.func and forward-mode differentiation: unset it'
    if device.type != DEVICE:
        return f'is for CUDA, and the tensors are on {device}: unset it, or set it to sdpa'
    if dtype not in DTYPES:
        return f'is for float32, bfloat16 and float16, not {str(dtype)[6:]}: unset it, or set it to sdpa'
    if head_dim not in HEAD_DIMS:
        return f'is for {", ".join(map(str, HEAD_DIMS))} channels per head, not {head_dim}: unset it, or set it to sdpa'
    return unable_on(device, dtype, head_dim)


def is_worthwhile(needs_grad: bool) -> bool:
    """Whether to take this path where it can serve. An exported graph should hold only PyTorch's own operators.

    Before PyTorch 2.7 nothing tells export from compilation, so there a graph without gradients gets none of ours.
    """
    return may_use_functions() and (needs_grad or compat.CAN_TELL_EXPORTING or not compat.is_compiling())


@compat.constant_in_graphs
def unable_on(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this path can't serve calls with such tensors on a GPU with this software, or None; tried once."""
    return _unable_on(device, dtype, head_dim)


@lru_cache(maxsize=None)
def _unable_on(device, dtype, head_dim):
    if not compat.HAS_CUSTOM_OP:
        return f'needs PyTorch 2.4 or later, not {torch.__version__}: unset it, or set it to sdpa'
    if device.type == 'cuda' and (torch.version.hip or torch.cuda.get_device_capability(device) < CAPABILITY):
        name = torch.cuda.get_device_name(device)
        return f'needs an NVIDIA GPU from Ampere on, not {name}: unset it, or set it to sdpa'
    try:
        _try_triton(device, dtype, head_dim)
    except Exception as error:  # it is not there, too old, without a C compiler, or broken in some other way
        return f'needs Triton, which does not work here ({first_line(error)}): repair it, unset it, or set it to sdpa'
    return None


def _try_triton(device, dtype, head_dim):
    """Raise an error unless the kernels agree with the formula on a small map. Compilers have had bugs here."""
    import triton

    if int(triton.__version__.partition('.')[0]) < 3:
        raise ImportError(f'version {triton.__version__} is older than 3')
    with _disable_current_modes(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        error = _error_of_trial(device, dtype, head_dim)
    if not error <= TOLERANCE:
        raise RuntimeError(f'with version {triton.__version__} results in {str(dtype)[6:]} are {error:.1%} off')


def _error_of_trial(device, dtype, head_dim, heads=2):
    """The largest error of the output and its gradients, as root of the mean square over that of the true values."""
    windows, random = partition(*TRIAL, device), torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(device)

    qkv, grad = (draw(*TRIAL[:3], n * heads * head_dim).to(dtype) for n in (3, 1))
    scale, table = torch.full((heads, 1, 1), 5.0, device=device), draw(heads, *(2 * n - 1 for n in windows.largest))
    out, sums = map_attention(qkv, scale, table, windows.window, windows.shift)
    grads = map_attention_backward(grad, qkv, scale, table, out, sums, windows.window, windows.shift)
    with torch.enable_grad():
        leaves = [x.double().requires_grad_() for x in (qkv, table)]
        true = map_windows(lambda x, part: reference.attention(x, scale, leaves[1], part.groups), leaves[0], [windows])
        true_grads = torch.autograd.grad(true, leaves, grad.double())
    pairs = zip((out, grads[0], grads[2]), (true, *true_grads))
    return max(((ours - exact).square().mean() / exact.square().mean()).sqrt().item() for ours, exact in pairs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, scale, table, window, shift):
        out, lse = map_attention(qkv, scale, table, window, shift)
        ctx.save_for_backward(qkv, scale, table, out, lse)
        ctx.window, ctx.shift = window, shift
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *map_attention_backward(grad, *ctx.saved_tensors, ctx.window, ctx.shift), None, None


class _Shape(NamedTuple):
    """What the host knows of a call. ``rows`` and ``columns`` are those of the largest window, in whole strips of 8."""

    batch: int
    height: int
    width: int
    window: int
    shift: int
    num_heads: int
    head_dim: int
    rows: int
    columns: int

    @property
    def sizes(self):
        """What the kernels take."""
        return self.height, self.width, self.window, self.shift, self.num_heads

    @property
    def segments(self):
        """Rows and columns of windows on a map."""
        return [
            1 if length <= self.window else 1 + -(-(length - (self.shift or self.window)) // self.window)
            for length in (self.height, self.width)
        ]

    @property
    def per_token(self):
        """The shape of what is kept for each token of each head, in the kernels' order."""
        down, across = self.segments
        return self.batch * down * across, self.num_heads, self.rows * self.columns


def _shape(qkv, table, window, shift):
    batch, height, width, channels = qkv.shape
    rows, columns = (-(-min(length, window) // 8) * 8 for length in (height, width))
    return _Shape(batch, height, width, window, shift, len(table), channels // (3 * len(table)), rows, columns)


def _fake(qkv, scale, table, window, shift):
    lse = qkv.new_empty(_shape(qkv, table, window, shift).per_token, dtype=torch.float32)
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), lse


@compat.operator(
    'swinv2_mm::map_attention',
    '(Tensor qkv, Tensor scale, Tensor table, int window, int shift) -> (Tensor, Tensor)',
    _fake,
)
def map_attention(qkv: Tensor, scale: Tensor, table: Tensor, window: int, shift: int) -> tuple[Tensor, Tensor]:
    """`attention`, and for each query of each head the logarithm, base 2, of its sum of exponentials."""
    shape = _shape(qkv, table, window, shift)
    out, lse = _fake(qkv, scale, table, window, shift)
    with on_device_of(qkv):
        table = _resized(table, shape.rows, shape.columns)
        _launch('forward', shape, qkv.contiguous(), scale, table, out, lse)
    return out, lse


def _fake_backward(grad, qkv, scale, table, out, lse, window, shift):
    return qkv.new_empty(qkv.shape), torch.empty_like(scale), table.new_empty(table.shape)


@compat.operator(
    'swinv2_mm::map_attention_backward',
    '(Tensor grad, Tensor qkv, Tensor scale, Tensor table, Tensor out, Tensor lse, int window, int shift) '
    '-> (Tensor, Tensor, Tensor)',
    _fake_backward,
)
def map_attention_backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, table: Tensor, out: Tensor, lse: Tensor, window: int, shift: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``qkv``, ``scale`` and ``table``."""
    shape = _shape(qkv, table, window, shift)
    grad_qkv, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    with on_device_of(qkv):
        grad, qkv, wide = grad.contiguous(), qkv.contiguous(), _resized(table, shape.rows, shape.columns)
        grad_scale = scale.new_empty(_num_programs('query', shape, qkv.dtype))
        _launch('query', shape, qkv, scale, wide, out, lse, grad, grad_qkv, delta, grad_scale)
        _launch('key', shape, qkv, scale, wide, lse, grad, delta, grad_qkv)
        grad_table = _table_gradient(shape, qkv, scale, wide, lse, grad, delta)
        grad_table = _resized(grad_table, *((side + 1) // 2 for side in table.shape[1:]))
        return grad_qkv, grad_scale.view(-1, shape.num_heads).sum(0).view_as(scale), grad_table


def scratch_bytes(qkv: Tensor, table: Tensor, window: int, shift: int) -> int:
    """What backward holds of sums over pairs of tokens, which does not grow with the batch."""
    shape = _shape(qkv, table, window, shift)
    slices, heads = _slices_and_heads(shape, qkv.dtype)
    return 4 * slices * (heads * (shape.rows * shape.columns) ** 2 + table.numel())


def _slices_and_heads(shape, dtype):
    """Into how many slices windows are divided, and how many heads are taken at once."""
    num_tokens = shape.rows * shape.columns
    pairs_of_tiles = (num_tokens // tile_of('pair', dtype, shape.head_dim).block) ** 2
    slices = min(max(PROGRAMS // (pairs_of_tiles * shape.num_heads), 1), shape.batch * shape.segments[0])
    return slices, min(max(SCRATCH // (4 * max(slices, 1) * num_tokens**2), 1), shape.num_heads)


def _table_gradient(shape, qkv, *tensors):
    """(heads, 2 * rows - 1, 2 * columns - 1), some heads at a time: their sums over pairs of tokens are large."""
    from .attention_kernels import fold_kernel, pair_kernel

    tile, num_tokens = tile_of('pair', qkv.dtype, shape.head_dim), shape.rows * shape.columns
    slices, at_once = _slices_and_heads(shape, qkv.dtype)
    sides = 2 * shape.rows - 1, 2 * shape.columns - 1
    table = qkv.new_empty(slices, shape.num_heads, *sides, dtype=torch.float32)
    for first in range(0, shape.num_heads, at_once):
        heads = min(at_once, shape.num_heads - first)
        pairs = table.new_empty(slices, heads, num_tokens, num_tokens)
        pair_kernel[(slices * heads * (num_tokens // tile.block) ** 2,)](
            qkv, *tensors, pairs, *shape.sizes, first, heads, shape.batch * shape.segments[0], slices,
            D=shape.head_dim, BLOCK=tile.block, **_compiled(tile, qkv.dtype),
        )  # fmt: skip
        fold_kernel[(slices * heads * sides[0] * -(-sides[1] // FOLD['OFFSETS']),)](
            pairs, table, shape.rows, shape.columns, shape.num_heads, first, heads, **FOLD
        )
    return table[0] if slices == 1 else table.sum(0)


def _resized(table, rows, columns):
    """A table of offsets for windows of rows x columns: its centre, or with zeros around it."""
    down, across = (size - (side + 1) // 2 for size, side in zip((rows, columns), table.shape[1:]))
    return F.pad(table, (across, across, down, down)).contiguous() if down or across else table.contiguous()


def _launch(name, shape, qkv, *tensors):
    """Run a kernel with one program for each tile of each window and head."""
    from . import attention_kernels

    tile = tile_of(name, qkv.dtype, shape.head_dim)
    getattr(attention_kernels, f'{name}_kernel')[(_num_programs(name, shape, qkv.dtype),)](
        qkv, *tensors, *shape.sizes,
        D=shape.head_dim, BLOCK=tile.block, INNER=tile.inner, **_compiled(tile, qkv.dtype),
    )  # fmt: skip


def _num_programs(name, shape, dtype):
    windows, heads, num_tokens = shape.per_token
    return windows * heads * (num_tokens // tile_of(name, dtype, shape.head_dim).block)


def _compiled(tile, dtype):
    """How to compile a kernel: products of float32 are as exact as PyTorch's own are set to be."""
    precision = 'ieee' if dtype != torch.float32 else 'tf32' if compat.may_use_tf32() else 'tf32x3'
    return dict(PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True)


def on_device_of(x: Tensor):
    """A context in which kernels run on the GPU of a tensor, which may not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
