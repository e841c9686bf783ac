"""FLOPs of attention, for counters that only know the operators in their tables."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape

from .. import compat
from ..windows import partition

FORWARD_PRODUCTS = 2  # matrix products of N x N x d per window and head: logits, and weights times values
BACKWARD_PRODUCTS = 5  # logits again, and the gradients of weights, queries, keys and values


def register() -> None:
    """Teach PyTorch's `FlopCounterMode` and mmengine's analysis our operators and PyTorch's attention."""
    table = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS  # which mmdet's and mmseg's tools use too
    table.setdefault('aten::scaled_dot_product_attention', _traced_attention)
    table.setdefault('swinv2_mm::window_attention', _traced_window_attention)
    if compat.HAS_CUSTOM_OP:
        from torch.utils.flop_counter import flop_registry, register_flop_formula

        operators = torch.ops.swinv2_mm
        if operators.window_attention not in flop_registry:
            register_flop_formula(operators.window_attention)(_forward)
            register_flop_formula(operators.window_attention_backward)(_backward)
            register_flop_formula(operators.map_attention)(_forward_on_map)
            register_flop_formula(operators.map_attention_backward)(_backward_on_map)
        for suffix in ('', '_backward'):  # of the kernel for GPUs, to that for CPUs, which it lacks
            on_gpu, on_cpu = (f'_scaled_dot_product_flash_attention{device}{suffix}' for device in ('', '_for_cpu'))
            flop_registry.setdefault(getattr(torch.ops.aten, on_cpu), flop_registry[getattr(torch.ops.aten, on_gpu)])


def attention_flops(channels: int, groups: Sequence[int], products: int) -> int:
    """FLOPs of attention in some windows, where a multiplication and an addition are two.

    Args:
        channels (int): of all heads.
        groups (Sequence[int]): height, width and count of each group of windows, one after the other.
        products (int): matrix products of N x N x d per window and head.
    """
    pairs = sum(count * (height * width) ** 2 for height, width, count in zip(*(groups[i::3] for i in range(3))))
    return 2 * products * channels * pairs


def _forward(qkv_shape, scale_shape, table_shape, groups, **kwargs):
    return attention_flops(qkv_shape[1] // 3, groups, FORWARD_PRODUCTS)


def _backward(grad_shape, qkv_shape, scale_shape, table_shape, groups, **kwargs):
    return attention_flops(qkv_shape[1] // 3, groups, BACKWARD_PRODUCTS)


def _forward_on_map(qkv_shape, scale_shape, table_shape, window, shift, **kwargs):
    return attention_flops(qkv_shape[3] // 3, _groups(qkv_shape, window, shift), FORWARD_PRODUCTS)


def _backward_on_map(grad_shape, qkv_shape, scale_shape, table_shape, attended, sums, window, shift, **kwargs):
    return attention_flops(qkv_shape[3] // 3, _groups(qkv_shape, window, shift), BACKWARD_PRODUCTS)


def _groups(qkv_shape, window, shift):
    groups = partition(*qkv_shape[:3], window, shift, 'meta').groups
    return [size for group in groups for size in group]


def _traced_attention(inputs, outputs):
    """FLOPs as mmengine counts them, where a multiplication and an addition are one."""
    query, key = (get_shape(value) for value in inputs[:2])  # (windows, heads, N, d)
    return FORWARD_PRODUCTS * prod(query) * key[-2]


def _traced_window_attention(inputs, outputs):
    """The same of our operator, whose groups of windows are constants of the trace."""
    groups = [size.toIValue() for size in inputs[3].node().inputs()]
    return attention_flops(get_shape(inputs[0])[1] // 3, groups, FORWARD_PRODUCTS) // 2
