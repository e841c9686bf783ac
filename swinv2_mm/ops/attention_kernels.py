"""Triton kernels of attention in ragged windows of a map in its natural order, which `flash_cuda.py` launches.

A program finds its window on the map by arithmetic (`windows.axis_segments`), so there is no index and no gather. It
owns a tile of one window and one head: `BLOCK` tokens, 8 columns wide and ``BLOCK // 8`` rows high. So the place of a
token in its tile is known to the compiler, and the bias of a (query, key) pair is a load at a constant distance.

Windows are rounded up to whole tiles. Tokens beyond a window repeat its border and count nothing. What is kept per
token is in strip order: (windows, heads, strips of 8 columns, rows, 8), with rows and strips rounded up.

Logits are products of raw queries and keys, in float32 times the inverse of both norms, so that no operand is rounded.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

STRIP = tl.constexpr(8)  # columns of a tile
LOG2_E = tl.constexpr(1.4426950408889634)
SQUARED_EPS = tl.constexpr(1e-24)  # of the norms, as in `torch.nn.functional.normalize`
NEVER = tl.constexpr(-1e38)  # the cosine of a key beyond the window, so that no scale lets it count
INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')
# Nothing is compiled anew for another size, or for a table that begins at another multiple of four bytes.
GENERAL = ['table', 'height', 'width', 'window', 'shift', 'num_heads']
GENERAL_PAIRS = [*GENERAL, 'first_head', 'heads', 'strips', 'slices']


@triton.jit
def _first(length, window, shift):
    """Size of the first segment of an axis."""
    return tl.where(length <= window, length, tl.where(shift > 0, shift, window))


@triton.jit
def _count(length, window, shift):
    """Segments of an axis."""
    return 1 + tl.cdiv(length - _first(length, window, shift), window)


@triton.jit
def _segment(i, length, window, shift):
    """Start and size of a segment of an axis."""
    first = _first(length, window, shift)
    start = tl.maximum(first + (i - 1) * window, 0)
    return start, tl.minimum(first + i * window, length) - start


@triton.jit
def _rounded(length, window):
    """Tokens of the longest segment of an axis, in whole strips."""
    return tl.cdiv(tl.minimum(length, window), STRIP) * STRIP


@triton.jit
def _own_tile(height, width, window, shift, num_heads, BLOCK: tl.constexpr):
    """The tile of this program.

    Its head; the number of its window, that window's first token on the flat map, its height and width; and the first
    row and column of the tile in the window.
    """
    pid = tl.program_id(0)
    down = _rounded(height, window) // (BLOCK // STRIP)
    tiles = down * (_rounded(width, window) // STRIP)
    tile = pid // num_heads % tiles
    number = pid // num_heads // tiles
    rows, columns = _count(height, window, shift), _count(width, window, shift)
    top, h = _segment(number // columns % rows, height, window, shift)
    left, w = _segment(number % columns, width, window, shift)
    origin = (number // (rows * columns) * height + top) * width + left
    return pid % num_heads, number, origin, h, w, tile % down * (BLOCK // STRIP), tile // down * STRIP


@triton.jit
def _tokens(row, column, t, origin, h, w, width):
    """Tokens of the tile that begins at a row and a column: places on the flat map, and which are in the window."""
    r, c = row + t // STRIP, column + t % STRIP
    return origin + tl.minimum(r, h - 1) * width + tl.minimum(c, w - 1), (r < h) & (c < w)


@triton.jit
def _vectors(pointer, places, stride, D: tl.constexpr):
    """(tokens, D)."""
    return tl.load(pointer + places.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :])


@triton.jit
def _store(pointer, places, stride, values, here, D: tl.constexpr):
    pointers = pointer + places.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, cast(values, pointer.dtype.element_ty), here[:, None])


@triton.jit
def _inverse_norm(x):
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, 1), SQUARED_EPS))


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # its product takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # it truncates, where a GPU rounds to the nearest
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _place_of_bias(t, line):
    """Where tokens of a tile lie in a table of offsets with lines of this length, from the tile's first token."""
    return (t // STRIP).to(tl.int64) * line + t % STRIP


@triton.jit
def _bias(pointers):
    """Values of the table, straight from the L1 cache into the layout of the logits.

    A plain load takes the way through shared memory. In a prototype its buffers also overlapped those of a product that
    reads one operand twice: on an H200, with two stages, gradients in bfloat16 were off by up to 5 percent.
    """
    if INTERPRETED:
        return tl.load(pointers)
    return tl.inline_asm_elementwise(
        'ld.global.nc.f32 $0, [$1];',
        '=f,l',
        [pointers.to(tl.uint64, bitcast=True)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit(do_not_specialize=GENERAL)
def forward_kernel(
    qkv, scale, table, out, lse,
    height, width, window, shift, num_heads,
    D: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile of queries, and the logarithms, base 2, of their sums of exponentials."""
    head, number, origin, h, w, top, left = _own_tile(height, width, window, shift, num_heads, BLOCK)
    if (top < h) & (left < w):
        th, tw = _rounded(height, window), _rounded(width, window)
        line = 2 * tw - 1
        stride = 3 * D * num_heads
        t, u = tl.arange(0, BLOCK), tl.arange(0, INNER)
        table += (head * (2 * th - 1) + th - 1 + top) * line + tw - 1 + left
        of_query, of_key = table + _place_of_bias(t, line), _place_of_bias(u, line)
        places, here = _tokens(top, left, t, origin, h, w, width)
        q = _vectors(qkv + head * D, places, stride, D)
        rq = _inverse_norm(q) * tl.load(scale + head)
        keys = qkv + (num_heads + head) * D
        highest = tl.full([BLOCK], float('-inf'), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, D], tl.float32)
        down = tl.cdiv(h, INNER // STRIP)
        for tile in range(0, down * tl.cdiv(w, STRIP)):
            row, column = tile % down * (INNER // STRIP), tile // down * STRIP
            others, is_key = _tokens(row, column, u, origin, h, w, width)
            k = _vectors(keys, others, stride, D)
            v = _vectors(keys + num_heads * D, others, stride, D)
            bias = _bias((of_query - (row * line + column))[:, None] - of_key[None, :])
            s = _product(q, tl.trans(k), tl.zeros([BLOCK, INNER], tl.float32), PRECISION)
            s = (s * _inverse_norm(k)[None, :] + tl.where(is_key, 0.0, NEVER)[None, :]) * rq[:, None] + bias
            new = tl.maximum(highest, tl.max(s, 1))
            decay = tl.exp2((highest - new) * LOG2_E)
            p = tl.exp2(s * LOG2_E - (new * LOG2_E)[:, None])
            total = total * decay + tl.sum(p, 1)
            acc = _product(cast(p, v.dtype), v, acc * decay[:, None], PRECISION)
            highest = new
        _store(out + head * D, places, num_heads * D, acc / total[:, None], here, D)
        slot = ((number * num_heads + head) * tw + left).to(tl.int64) * th + top * STRIP
        tl.store(lse + slot + t, tl.where(here, highest * LOG2_E + tl.log2(total), float('inf')))


@triton.jit(do_not_specialize=GENERAL)
def query_kernel(
    qkv, scale, table, out, lse, grad, grad_qkv, delta, grad_scale,
    height, width, window, shift, num_heads,
    D: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, its share of that of the scale, and delta, which the next kernels need."""
    head, number, origin, h, w, top, left = _own_tile(height, width, window, shift, num_heads, BLOCK)
    share = 0.0
    if (top < h) & (left < w):
        th, tw = _rounded(height, window), _rounded(width, window)
        line = 2 * tw - 1
        stride = 3 * D * num_heads
        t, u = tl.arange(0, BLOCK), tl.arange(0, INNER)
        table += (head * (2 * th - 1) + th - 1 + top) * line + tw - 1 + left
        of_query, of_key = table + _place_of_bias(t, line), _place_of_bias(u, line)
        places, here = _tokens(top, left, t, origin, h, w, width)
        q = _vectors(qkv + head * D, places, stride, D)
        do = _vectors(grad + head * D, places, num_heads * D, D)
        d = tl.sum(_vectors(out + head * D, places, num_heads * D, D).to(tl.float32) * do.to(tl.float32), 1)
        slot = ((number * num_heads + head) * tw + left).to(tl.int64) * th + top * STRIP
        log = tl.load(lse + slot + t)
        unit = q.to(tl.float32) * _inverse_norm(q)[:, None]
        rq = _inverse_norm(q) * tl.load(scale + head)
        keys = qkv + (num_heads + head) * D
        acc = tl.zeros([BLOCK, D], tl.float32)
        down = tl.cdiv(h, INNER // STRIP)
        for tile in range(0, down * tl.cdiv(w, STRIP)):
            row, column = tile % down * (INNER // STRIP), tile // down * STRIP
            others, is_key = _tokens(row, column, u, origin, h, w, width)
            k = _vectors(keys, others, stride, D)
            v = _vectors(keys + num_heads * D, others, stride, D)
            bias = _bias((of_query - (row * line + column))[:, None] - of_key[None, :])
            rk = _inverse_norm(k)
            s = _product(q, tl.trans(k), tl.zeros([BLOCK, INNER], tl.float32), PRECISION)
            s = (s * rk[None, :] + tl.where(is_key, 0.0, NEVER)[None, :]) * rq[:, None] + bias
            p = tl.exp2(s * LOG2_E - log[:, None])
            ds = p * (_product(do, tl.trans(v), tl.zeros([BLOCK, INNER], tl.float32), PRECISION) - d[:, None])
            if k.dtype == tl.float16:  # for its range
                k = (k.to(tl.float32) * rk[:, None]).to(k.dtype)
            else:
                ds *= rk[None, :]
            acc = _product(cast(ds, k.dtype), k, acc, PRECISION)
        along = tl.sum(acc * unit, 1)
        share = tl.sum(tl.where(here, along, 0.0), 0)
        tl.store(delta + slot + t, d)
        _store(grad_qkv + head * D, places, stride, (acc - unit * along[:, None]) * rq[:, None], here, D)
    tl.store(grad_scale + tl.program_id(0), share)


@triton.jit(do_not_specialize=GENERAL)
def key_kernel(
    qkv, scale, table, lse, grad, delta, grad_qkv,
    height, width, window, shift, num_heads,
    D: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values. What is kept of queries has to be there for whole `INNER` tiles."""
    head, number, origin, h, w, top, left = _own_tile(height, width, window, shift, num_heads, BLOCK)
    if (top < h) & (left < w):
        th, tw = _rounded(height, window), _rounded(width, window)
        line = 2 * tw - 1
        stride = 3 * D * num_heads
        t, u = tl.arange(0, BLOCK), tl.arange(0, INNER)
        table += (head * (2 * th - 1) + th - 1 - top) * line + tw - 1 - left
        of_query, of_key = table + _place_of_bias(u, line), _place_of_bias(t, line)
        places, here = _tokens(top, left, t, origin, h, w, width)
        factor = tl.load(scale + head)
        qkv += head * D
        k = _vectors(qkv + num_heads * D, places, stride, D)
        v = _vectors(qkv + 2 * num_heads * D, places, stride, D)
        rk = _inverse_norm(k)
        dk = tl.zeros([BLOCK, D], tl.float32)
        dv = tl.zeros([BLOCK, D], tl.float32)
        first_slot = ((number * num_heads + head) * tw).to(tl.int64) * th
        down = tl.cdiv(h, INNER // STRIP)
        for tile in range(0, down * tl.cdiv(w, STRIP)):
            row, column = tile % down * (INNER // STRIP), tile // down * STRIP
            others, _ = _tokens(row, column, u, origin, h, w, width)
            q = _vectors(qkv, others, stride, D)
            do = _vectors(grad + head * D, others, num_heads * D, D)
            bias = _bias((of_query + (row * line + column))[:, None] - of_key[None, :])
            slot = first_slot + column * th + row * STRIP
            log, d = tl.load(lse + slot + u), tl.load(delta + slot + u)
            rq = _inverse_norm(q)
            s = _product(q, tl.trans(k), tl.zeros([INNER, BLOCK], tl.float32), PRECISION)
            p = tl.exp2(
                (s * rk[None, :] * (rq * factor)[:, None] + bias) * LOG2_E - log[:, None]
            )  # 0 beyond the window
            dv = _product(tl.trans(cast(p, do.dtype)), do, dv, PRECISION)
            ds = p * (_product(do, tl.trans(v), tl.zeros([INNER, BLOCK], tl.float32), PRECISION) - d[:, None])
            if q.dtype == tl.float16:  # for its range
                q = (q.to(tl.float32) * rq[:, None]).to(q.dtype)
            else:
                ds *= rq[:, None]
            dk = _product(tl.trans(cast(ds, q.dtype)), q, dk, PRECISION)
        unit = k.to(tl.float32) * rk[:, None]
        dk = (dk - unit * tl.sum(dk * unit, 1)[:, None]) * (rk * factor)[:, None]
        _store(grad_qkv + (num_heads + head) * D, places, stride, dk, here, D)
        _store(grad_qkv + (2 * num_heads + head) * D, places, stride, dv, here, D)


@triton.jit(do_not_specialize=GENERAL_PAIRS)
def pair_kernel(
    qkv, scale, table, lse, grad, delta, pairs,
    height, width, window, shift, num_heads, first_head, heads, strips, slices,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the biases of the pairs of two tiles, summed over a slice of the windows, of which strips are rows.

    Two tiles are the same offsets in every window, so that their bias stays in registers. A smaller window adds nothing
    to what it does not have. ``pairs`` is (slices, heads, N, N), with queries and keys in strip order.
    """
    th, tw = _rounded(height, window), _rounded(width, window)
    down = th // (BLOCK // STRIP)
    tiles = down * (tw // STRIP)
    pid = tl.program_id(0)
    head = first_head + pid % heads
    tile_i, tile_j = pid // heads // tiles % tiles, pid // heads % tiles
    part = pid // heads // (tiles * tiles)
    row_i, row_j = tile_i % down * (BLOCK // STRIP), tile_j % down * (BLOCK // STRIP)
    column_i, column_j = tile_i // down * STRIP, tile_j // down * STRIP
    line = 2 * tw - 1
    stride = 3 * D * num_heads
    t = tl.arange(0, BLOCK)
    table += (head * (2 * th - 1) + th - 1 + row_i - row_j) * line + tw - 1 + column_i - column_j
    bias = _bias((table + _place_of_bias(t, line))[:, None] - _place_of_bias(t, line)[None, :])
    factor = tl.load(scale + head)
    qkv += head * D
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    rows, columns = _count(height, window, shift), _count(width, window, shift)
    for strip in range(part * strips // slices, (part + 1) * strips // slices):
        top, h = _segment(strip % rows, height, window, shift)
        top = (strip // rows * height + top) * width
        for column in range(columns if (row_i < h) & (row_j < h) else 0):
            left, w = _segment(column, width, window, shift)
            queries, is_query = _tokens(row_i, column_i, t, top + left, h, w, width)
            keys, is_key = _tokens(row_j, column_j, t, top + left, h, w, width)
            q = _vectors(qkv, queries, stride, D)
            k = _vectors(qkv + num_heads * D, keys, stride, D)
            v = _vectors(qkv + 2 * num_heads * D, keys, stride, D)
            do = _vectors(grad + head * D, queries, num_heads * D, D)
            slot = (((strip * columns + column) * num_heads + head) * tw + column_i).to(tl.int64) * th + row_i * STRIP
            log = tl.load(lse + slot + t, is_query, float('inf'))
            d = tl.load(delta + slot + t, is_query, 0.0)
            s = _product(q, tl.trans(k), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
            s = s * _inverse_norm(k)[None, :] + tl.where(is_key, 0.0, NEVER)[None, :]
            s = s * (_inverse_norm(q) * factor)[:, None] + bias
            dp = _product(do, tl.trans(v), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
            acc += tl.exp2(s * LOG2_E - log[:, None]) * (dp - d[:, None])
    pairs += (part * heads + head - first_head).to(tl.int64) * (th * tw) * (th * tw)
    places = (tile_i * BLOCK + t).to(tl.int64)[:, None] * (th * tw) + (tile_j * BLOCK + t)[None, :]
    tl.store(pairs + places, acc)


@triton.jit(do_not_specialize=['height', 'width', 'num_heads', 'first_head', 'heads'])
def fold_kernel(
    pairs, grad_table, height, width, num_heads, first_head, heads, OFFSETS: tl.constexpr, QUERIES: tl.constexpr
):
    """Gradients of some offsets of a row of the table, (slices, num_heads, 2H-1, 2W-1): sums of ``pairs`` over queries.

    ``pairs`` is (slices, heads, N, N) for windows of height x width tokens, in whole strips.
    """
    lines, line = 2 * height - 1, 2 * width - 1
    chunks = tl.cdiv(line, OFFSETS)
    pid = tl.program_id(0)
    number = pid // chunks % lines
    below = number - (height - 1)  # rows from key to query
    offsets = pid % chunks * OFFSETS + tl.arange(0, OFFSETS)
    across = offsets - (width - 1)  # columns from key to query
    part, head = pid // chunks // lines // heads, pid // chunks // lines % heads
    pairs += (part * heads + head).to(tl.int64) * (height * width) * (height * width)
    count = (height - tl.abs(below)) * width  # queries that have such a key
    acc = tl.zeros([OFFSETS], tl.float32)
    for start in range(0, count, QUERIES):
        i = start + tl.arange(0, QUERIES)
        row, column = tl.maximum(below, 0) + i // width, i % width
        query = (column // STRIP * height + row) * STRIP + column % STRIP
        other = column[:, None] - across[None, :]
        key = (other // STRIP * height + (row - below)[:, None]) * STRIP + other % STRIP
        here = (i < count)[:, None] & (other >= 0) & (other < width)
        acc += tl.sum(tl.load(pairs + query.to(tl.int64)[:, None] * (height * width) + key, here, 0.0), 0)
    grad_table += ((part * num_heads + first_head + head).to(tl.int64) * lines + number) * line
    tl.store(grad_table + offsets, acc, offsets < line)
