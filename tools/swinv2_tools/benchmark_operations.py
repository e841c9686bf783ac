"""The matrix products of a backbone at one setting of the benchmark: shapes, and operations to count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from swinv2_mm.arch import parse_arch
from swinv2_mm.windows import WindowGroup, partition

if TYPE_CHECKING:
    from swinv2_tools.benchmark_work import Work

ROWS = 4096  # of a matrix product of `gemm` on a CPU; larger ones do not fit the cache and are slower
WEIGHTS = 2**21  # attention weights of such a product


def layers(work: Work) -> Iterator[tuple[int, int, int, int]]:
    """Every kind of linear layer: tokens, input and output channels, and how many there are."""
    arch = parse_arch(work.arch)
    for i, (depth, tokens) in enumerate(zip(arch.depths, map(math.prod, map_sizes(work)))):
        channels, tokens = arch.embed_dims * 2**i, tokens * work.batch
        yield (tokens, 48, channels, 1) if i == 0 else (tokens, 2 * channels, channels, 1)
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            yield tokens, inputs * channels, outputs * channels, depth


def attentions(work: Work) -> Iterator[tuple[WindowGroup, int, int]]:
    """Every kind of attention: a group of windows, its heads, and how many blocks have it."""
    arch = parse_arch(work.arch)
    for depth, num_heads, (height, width) in zip(arch.depths, arch.num_heads, map_sizes(work)):
        for shift, blocks in ((0, (depth + 1) // 2), (work.window // 2, depth // 2)):
            for group in partition(work.batch, height, width, work.window, shift).groups:
                yield group, num_heads, blocks


def map_sizes(work: Work) -> list[tuple[int, int]]:
    """Height and width in tokens, per stage."""
    return [(-(-work.height // stride), -(-work.width // stride)) for stride in (4, 8, 16, 32)]


def flops(work: Work) -> int:
    """Floating point operations of the matrix products of one step, without any that padding or recomputation adds."""
    linear = sum(2 * tokens * inputs * outputs * count for tokens, inputs, outputs, count in layers(work))
    attention = sum(
        4 * group.count * num_heads * (group.height * group.width) ** 2 * 32 * blocks
        for group, num_heads, blocks in attentions(work)
    )
    return (3 if work.mode == 'train' else 1) * (linear + attention)


def matrix_products(work: Work) -> Iterator[tuple[tuple, tuple, int]]:
    """Shapes of both operands and how often they are multiplied: what `flops` counts.

    On a CPU they are cut to pieces that fit its cache; on a GPU they are whole.
    """
    train, on_cpu = work.mode == 'train', work.device == 'cpu'
    for tokens, inputs, outputs, count in layers(work):
        for rows, times in pieces(tokens, ROWS if on_cpu else tokens):
            yield (rows, inputs), (inputs, outputs), count * times
            if train:  # the gradients of the input and of the weight
                yield (rows, outputs), (outputs, inputs), count * times
                yield (outputs, rows), (rows, inputs), count * times
    for group, num_heads, blocks in attentions(work):
        num_tokens = group.height * group.width
        total = group.count * num_heads
        for matrices, times in pieces(total, max(WEIGHTS // num_tokens**2, 1) if on_cpu else total):
            logits = (matrices, num_tokens, 32), (matrices, 32, num_tokens)
            attended = (matrices, num_tokens, num_tokens), (matrices, num_tokens, 32)
            yield *logits, blocks * times * (2 if train else 1)  # in training also the gradient of the weights
            yield *attended, blocks * times * (4 if train else 1)  # and those of queries, keys and values


def pieces(total: int, largest: int) -> list[tuple[int, int]]:
    """Cut a number into equal pieces and a rest: sizes and how many there are."""
    whole, rest = divmod(total, largest)
    return [(size, count) for size, count in ((largest, whole), (rest, 1)) if size and count]
