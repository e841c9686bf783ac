"""Attention inside windows on CPU, for inference and training, in tiles that stay in the cache.

Forward runs PyTorch's flash kernel for CPU on each tile. Backward computes the attention weights of a tile again, as
FlashAttention does (arXiv 2205.14135), and also the gradient of the position bias, which PyTorch's own backward of that
kernel lacks. Only ``qkv`` is kept between the two, and nothing of size N x N outlives a tile.

Both are custom operators, so that `torch.compile` does not trace every tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import compat
from ..position_bias import table_centre
from ..shortcuts import is_recorded, is_transforming, may_use_functions
from ..windows import WindowGroup
from .common import NO_DROPOUT, fold_reversed_bias, reversed_window_bias

ORDER = 'window'
TILE = 2**21  # attention weights in a tile
WEIGHTS = 2**19  # attention weights that backward holds at once, 2 MiB in float32
EPS = 1e-12  # of the norms, as in `torch.nn.functional.normalize`


def attention(qkv: Tensor, scale: Tensor, table: Tensor, groups: Sequence[WindowGroup], dropout: float = 0.0) -> Tensor:
    """As `reference.attention` without dropout, once differentiable; in float32 or wider, whatever ``qkv`` has."""
    return window_attention(qkv.contiguous(), scale, table, [size for group in groups for size in group])


def unable(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> str | None:
    """Why this path can't serve a call, or None."""
    if dropout > 0:
        return NO_DROPOUT
    if is_transforming():
        return 'does not support torch.func and forward-mode differentiation: unset it'
    if device.type != 'cpu':
        return f'is for CPU, and the tensors are on {device}: unset it, or set it to sdpa'
    return None


def is_worthwhile(needs_grad: bool) -> bool:
    """Whether to take this path where it can serve.

    An exported graph should hold only PyTorch's own operators. Without gradients, a compiler optimises those better
    than an operator that it can't look into. Counters of operators must see one operator, not its kernels.
    """
    if not may_use_functions():
        return False
    if compat.is_compiling():
        return needs_grad and compat.HAS_CUSTOM_OP
    return compat.HAS_CUSTOM_OP or not is_recorded()


@compat.custom_op('swinv2_mm::window_attention', '(Tensor qkv, Tensor scale, Tensor table, int[] groups) -> Tensor')
def window_attention(qkv: Tensor, scale: Tensor, table: Tensor, groups: Sequence[int]) -> Tensor:
    """`attention`, with height, width and count of each group one after the other."""
    num_heads = len(table)
    out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    with torch.autocast('cpu', enabled=False):
        for height, width, tokens, heads, tiles in _tiles(groups, num_heads):
            num_tokens = height * width
            qkv_windows = _in_windows(qkv[tokens], num_tokens, 3 * num_heads).unflatten(1, (3, -1))[:, :, heads]
            out_windows = _in_windows(out[tokens], num_tokens, num_heads)[:, heads]
            bias = reversed_window_bias(table[heads], height, width)[None]
            for tile in tiles:
                q, k, v, _ = _operands(qkv_windows[tile])
                out_windows[tile] = compat.flash_attention_on_cpu(q.mul_(scale[heads]), k, v, bias)
    return out


@window_attention.register_fake
def _(qkv, scale, table, groups):
    return qkv.new_empty(len(qkv), qkv.shape[1] // 3)


@compat.custom_op(
    'swinv2_mm::window_attention_backward',
    '(Tensor grad, Tensor qkv, Tensor scale, Tensor table, int[] groups) -> (Tensor, Tensor, Tensor)',
)
def window_attention_backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, table: Tensor, groups: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``qkv``, ``scale`` and ``table``."""
    num_heads = len(table)
    grad_qkv, grad_scale, grad_table = torch.empty_like(qkv), torch.zeros_like(scale), torch.zeros_like(table)
    with torch.autocast('cpu', enabled=False):
        for height, width, tokens, heads, tiles in _tiles(groups, num_heads):
            num_tokens = height * width
            qkv_windows, grad_qkv_windows = (
                _in_windows(x[tokens], num_tokens, 3 * num_heads).unflatten(1, (3, -1))[:, :, heads]
                for x in (qkv, grad_qkv)
            )
            grad_windows = _in_windows(grad[tokens], num_tokens, num_heads)[:, heads]
            bias = reversed_window_bias(table[heads], height, width)
            grad_bias = torch.zeros_like(bias)
            for tile in tiles:
                *qkv_tile, norms = _operands(qkv_windows[tile])
                q, k, v, grad_out = (x.to(table.dtype).contiguous() for x in (*qkv_tile, grad_windows[tile]))
                grads = _attention_backward(grad_out, q * scale[heads], k, v, bias, grad_bias)
                grad_scale[heads] += _normalize_backward_(grads[0], q, norms[0], scale[heads])
                _normalize_backward_(grads[1], k, norms[1])
                grad_qkv_windows[tile, 0] = grads[0]
                grad_qkv_windows[tile, 1:] = grads[1:].flip(3).transpose(0, 1)
            table_centre(grad_table[heads], height, width).add_(fold_reversed_bias(grad_bias, height, width))
    return grad_qkv, grad_scale, grad_table


@window_attention_backward.register_fake
def _(grad, qkv, scale, table, groups):
    return torch.empty_like(qkv), torch.empty_like(scale), torch.empty_like(table)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *window_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.groups), None


def _second_backward(ctx, *grads):
    raise RuntimeError('a second derivative needs the formula of attention: set SWINV2_MM_ATTENTION=reference')


window_attention.register_autograd(_backward, setup_context=_save_for_backward)
window_attention_backward.register_autograd(_second_backward)


def _tiles(groups: Sequence[int], num_heads: int) -> Iterator[tuple[int, int, slice, slice, list[slice]]]:
    """Yield, for some heads of a group, its height, width and tokens, the heads, and the windows of each tile.

    A tile has at most `TILE` attention weights. Heads are the outer loop, so that their bias is computed once for all
    windows and stays in the cache.
    """
    end = 0
    for height, width, count in zip(groups[::3], groups[1::3], groups[2::3]):
        start, end = end, end + height * width * count
        heads = min(max(TILE // (height * width) ** 2, 1), num_heads)
        windows = max(TILE // ((height * width) ** 2 * heads), 1)
        tiles = [slice(i, i + windows) for i in range(0, count, windows)]
        for i in range(0, num_heads, heads):
            yield height, width, slice(start, end), slice(i, i + heads), tiles


def _in_windows(x: Tensor, num_tokens: int, num_heads: int) -> Tensor:
    """A view, ``(windows, heads, N, d)``, of tokens ``(windows*N, heads*d)``."""
    return x.view(x.shape[0] // num_tokens, num_tokens, num_heads, x.shape[1] // num_heads).transpose(1, 2)


def _operands(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Unit queries, unit keys and values of a tile, keys and values last to first, and the norms of queries and keys.

    Args:
        qkv (Tensor): (windows, 3, heads, N, d).

    Returns:
        tuple: three new (windows, heads, N, d) in float32 or wider, and two norms, (windows, heads, N, 1) each.
    """
    qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    q, (k, v) = qkv[:, 0], qkv[:, 1:].flip(3).unbind(1)
    norms = tuple(torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (q, k))
    return q / norms[0].clamp(min=EPS), k.div_(norms[1].clamp(min=EPS)), v, norms


def _normalize_backward_(grad: Tensor, unit: Tensor, norm: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Turn the gradient of ``unit * scale``, in place, into that of the vectors before they were normalised.

    Args:
        grad (Tensor), unit (Tensor): (windows, heads, N, d).
        norm (Tensor): (windows, heads, N, 1), of the vectors.
        scale (Tensor | float): (heads, 1, 1).

    Returns:
        Tensor: (heads, 1, 1), the gradient of ``scale``.
    """
    along = (grad * unit).sum(-1, keepdim=True)
    grad.addcmul_(unit, along, value=-1).mul_(scale / norm.clamp(min=EPS))
    return along.sum((0, 2)).unsqueeze(-1)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grad_bias: Tensor) -> Tensor:
    """The gradients of the operands, with attention weights recomputed `WEIGHTS` at a time.

    Args:
        grad (Tensor), q (Tensor), k (Tensor), v (Tensor): (windows, heads, N, d), ``grad`` that of the output.
        bias (Tensor): (heads, N, N).
        grad_bias (Tensor): (heads, N, N), to which the gradient of ``bias`` is added.

    Returns:
        Tensor: (3, windows, heads, N, d), the gradients of ``q``, ``k`` and ``v``.
    """
    windows, heads, num_tokens, _ = q.shape
    grads = q.new_zeros(3, *q.shape)
    at_once = max(WEIGHTS // (heads * num_tokens**2), 1)
    rows = max(WEIGHTS // (heads * num_tokens), 1)
    for i in range(0, windows, at_once):
        w = slice(i, i + at_once)
        grad_q, grad_k, grad_v = (x[w].flatten(0, 1) for x in grads)
        grad_w, q_w, k_w, v_w = (x[w].flatten(0, 1) for x in (grad, q, k, v))  # (windows*heads, N, d)
        for j in range(0, num_tokens, rows):
            r = slice(j, j + rows)
            logits = q_w[:, r] @ k_w.mT
            logits.unflatten(0, (-1, heads)).add_(bias[:, r])
            weights = torch.softmax(logits, -1)
            grad_v.baddbmm_(weights.mT, grad_w[:, r])
            grad_logits = (grad_w[:, r] @ v_w.mT).mul_(weights)
            grad_logits.addcmul_(weights, grad_logits.sum(-1, keepdim=True), value=-1)
            per_window = grad_logits.unflatten(0, (-1, heads))
            grad_bias[:, r] += per_window[0] if len(per_window) == 1 else per_window.sum(0)
            grad_q[:, r].baddbmm_(grad_logits, k_w)
            grad_k.baddbmm_(grad_logits.mT, q_w[:, r])
    return grads
