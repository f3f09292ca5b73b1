"""Decode-sized products with deltas of which one input of many is kept (`kernels.kept`), on the binary tensor core.

A warp takes TILES tiles of 16 outputs of one mask block. For 256 of its kept inputs at a time, each lane gathers eight
elements of x, makes 16-bit integers of them (with a scale of these 256: nobody has made planes of x), transposes them
to a byte of every plane and trades those with seven lanes of its warp (`trade`): then planes lie where
`triton_signs.multiply` wants them. Values of b bits are b planes, taken from the highest down with the sums doubled in
between: S = sum_k q[n, k] x[k] exactly in 32 bits, and y[n] = half_step[n] * (2 S - (2^b - 1) sum_k x[k]).

All tiles are asked for before anything waits, as in `triton_signs`. Nothing passes between warps, and the programs of
one segment follow each other, so that its row of x stays in their multiprocessors' own cache.

Not covered: chips without `mma.b1` (`triton_compact_unpack`).
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import FORM, INPUTS, KEPT, OUTPUTS
from kernels.delta_linear.triton_share import prefetch
from kernels.delta_linear.triton_signs import multiply
from kernels.planes import LARGEST, transposed

_LARGEST = tl.constexpr(float(LARGEST))
_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float to which it has been added holds its rounded integer in its low bits"""
_EIGHT_MAGIC = tl.constexpr(8 * 0x4B400000 % 2**32)
"""Eight times its bits, in 32 bits"""

# Lane 4g' + q has a byte of planes 0-3, 4-7, 8-11, 12-15 in $4 to $7. It gets those of planes g' and 8 + g' of the
# eight lanes of the same q: lower four lanes' bytes of plane g' in $0, upper four's in $1, of plane 8 + g' in $2, $3.
# Each round trades what the lane that differs in one bit of g' wants for what this one wants.
_TRADE = tl.constexpr(
    """{ .reg .b32 l, t, s, u, r, v, k, m, a, b, c, d, give, low, high; .reg .pred p;
mov.u32 l, %laneid;
and.b32 t, l, 16; setp.ne.u32 p, t, 0;
selp.b32 s, $4, $5, p; selp.b32 k, $5, $4, p; selp.b32 u, $6, $7, p; selp.b32 m, $7, $6, p;
shfl.sync.bfly.b32 r, s, 16, 31, -1; shfl.sync.bfly.b32 v, u, 16, 31, -1;
selp.b32 a, r, k, p; selp.b32 b, k, r, p; selp.b32 c, v, m, p; selp.b32 d, m, v, p;
"""
    + "".join(
        f"""and.b32 t, l, {bit}; setp.ne.u32 p, t, 0;
selp.b32 give, 0x5410, 0x7632, p; selp.b32 low, 0x3524, 0x5140, p; selp.b32 high, 0x3726, 0x7160, p;
prmt.b32 s, a, b, give; prmt.b32 u, c, d, give;
shfl.sync.bfly.b32 r, s, {bit}, 31, -1; shfl.sync.bfly.b32 v, u, {bit}, 31, -1;
prmt.b32 a, a, r, low; prmt.b32 b, b, r, high; prmt.b32 c, c, v, low; prmt.b32 d, d, v, high;
"""
        for bit in (8, 4)
    )
    + "mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c; mov.b32 $3, d; }"
)


@triton.jit
def trade(words):
    """From a byte of every plane in each lane to planes as `multiply` takes them: int32 [WARPS * 128]. Never pure: all
    lanes of a warp take part."""
    return tl.inline_asm_elementwise(
        _TRADE, "=r,=r,=r,=r,r,r,r,r", [words], dtype=tl.int32, is_pure=False, pack=4
    )  # fmt: skip


@triton.jit
def picked(a, b, SELECTOR: tl.constexpr):
    """Four of the eight bytes of two words: what `prmt.b32` does."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,n", [a, b, SELECTOR], dtype=tl.uint32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _bytes(a, b, c, d):
    """The low bytes of four integers, and the next ones, as words."""
    ab, cd = picked(a, b, 0x5410), picked(c, d, 0x5410)
    return picked(ab, cd, 0x6420), picked(ab, cd, 0x7531)


@triton.jit
def _gathered(XROW, places, column, stride, K: tl.constexpr, j: tl.constexpr):
    """float32: x at the j-th of every lane's eight kept inputs, 0 where there is none.

    Args:
        places: of four of them in their groups, a byte each.
        column: where the group of the lane's first one begins. stride: from each one's group to the next one's.
    """
    place = (places >> (8 * (j % 4))) & 0xFF
    at = column + (j * stride + place)
    return tl.load(XROW + at, mask=at < K, other=0.0).to(tl.float32)


@triton.jit
def _integers(x, per_unit):
    """uint32 with x / unit, rounded, in its low 16 bits, in two's complement."""
    return (x * per_unit + _MAGIC).to(tl.uint32, bitcast=True)


@triton.jit
def gathered_planes(XROW, low, high, column, stride, K: tl.constexpr, WARPS: tl.constexpr):
    """Of 256 kept inputs for each warp: planes int32 [WARPS * 128]; what a unit is, float32, and the sum of the
    integers, int32, [WARPS, 8], the same eight times: as lanes that have the products want them.

    Args:
        low, high: int32 [WARPS * 32], places of a lane's first four and last four. column, stride: see `_gathered`.
    """
    x0, x1 = _gathered(XROW, low, column, stride, K, 0), _gathered(XROW, low, column, stride, K, 1)
    x2, x3 = _gathered(XROW, low, column, stride, K, 2), _gathered(XROW, low, column, stride, K, 3)
    x4, x5 = _gathered(XROW, high, column, stride, K, 4), _gathered(XROW, high, column, stride, K, 5)
    x6, x7 = _gathered(XROW, high, column, stride, K, 6), _gathered(XROW, high, column, stride, K, 7)
    most = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
    rest = tl.maximum(tl.maximum(tl.abs(x4), tl.abs(x5)), tl.maximum(tl.abs(x6), tl.abs(x7)))
    most = tl.max(tl.reshape(tl.maximum(most, rest), (WARPS, 8, 4)), 2)
    amax = tl.broadcast_to(tl.maximum(tl.max(most, 1), 1e-30)[:, None], (WARPS, 8))
    per_unit = (tl.zeros_like(amax) + _LARGEST) / amax
    per_unit = tl.reshape(tl.broadcast_to(per_unit[:, :, None], (WARPS, 8, 4)), (WARPS * 32,))
    q0, q1, q2, q3 = _integers(x0, per_unit), _integers(x1, per_unit), _integers(x2, per_unit), _integers(x3, per_unit)
    q4, q5, q6, q7 = _integers(x4, per_unit), _integers(x5, per_unit), _integers(x6, per_unit), _integers(x7, per_unit)
    total = ((q0 + q1) + (q2 + q3)) + ((q4 + q5) + (q6 + q7)) - _EIGHT_MAGIC
    sums = tl.sum(tl.sum(tl.reshape(total.to(tl.int32, bitcast=True), (WARPS, 8, 4)), 2), 1)
    low_1, high_1 = _bytes(q0, q1, q2, q3)
    low_2, high_2 = _bytes(q4, q5, q6, q7)
    p0, p4 = transposed(low_1, low_2)
    p8, p12 = transposed(high_1, high_2)
    words = tl.reshape(tl.join(tl.join(p0, p8), tl.join(p4, p12)), (WARPS * 128,)).to(tl.int32, bitcast=True)
    return trade(words), amax * (1.0 / _LARGEST), tl.broadcast_to(sums[:, None], (WARPS, 8))


@triton.jit
def _load_places(AT, item, c, tiles, tall, columns, TILES: tl.constexpr, WARPS: tl.constexpr):
    """int64 [WARPS * 32]: places of a lane's eight kept inputs, 0 of no tiles. Warps beyond the last tile repeat it."""
    lane = tl.arange(0, WARPS * 32)
    block = tl.minimum((item * WARPS + lane // 32) * TILES, tiles - 1) >> tall
    return tl.load(AT + (block * columns + c) * 32 + lane % 32, mask=block >= 0, other=0)


@triton.jit
def _load_values(AT, tile, tiles, bits, c, columns, BITS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr):
    """A tuple of int32 [TILES, WARPS * 128], a plane each, the lowest first; zeros beyond the variant's bits. Warp w
    has tiles tile + w TILES .. + TILES; those beyond the last repeat it."""
    e = tl.arange(0, WARPS * 128)[None, :]
    t = tl.minimum(tile + e // 128 * TILES + tl.arange(0, TILES)[:, None], tiles - 1)
    at = AT + (t * (bits * columns) + c) * 128 + e % 128
    values = ()
    for p in tl.static_range(BITS):
        if p == 0:
            values = values + (tl.load(at, eviction_policy="evict_first"),)
        else:
            there = e < tl.where(p < bits, WARPS * 128, 0)
            found = tl.load(at + p * columns * 128, mask=there & (t >= 0), other=0, eviction_policy="evict_first")
            values = values + (found,)
    return values


@triton.jit
def _sums(values, planes, BITS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr):
    """sum_k q[n, k] x[k] in units: int32 [TILES, WARPS, 8 (g), 2 (half)], of output g + 8 half of each tile."""
    WIDTH: tl.constexpr = WARPS * 128
    spread = tl.broadcast_to(planes[None, :], (TILES, WIDTH))
    low = tl.zeros((TILES, WIDTH), tl.int32)
    high = tl.zeros((TILES, WIDTH), tl.int32)
    low, high = multiply(values[BITS - 1], spread, low, high)
    for p in tl.static_range(1, BITS):
        low, high = multiply(values[BITS - 1 - p], spread, low + low, high + high)
    e = tl.arange(0, WIDTH)[None, :]
    column = e // 4 % 4 * 2 + e % 2
    weight = 1 << column
    total = low * weight + high * tl.where(column == 7, -32768, weight * 256)
    return tl.sum(tl.sum(tl.reshape(total, (TILES, WARPS, 8, 4, 2, 2)), 5), 3)


@triton.jit
def _shape(TABLE, at, base_outputs, K: tl.constexpr):
    """(outputs that it has values for, tile rows, columns of tiles, bits, log2 tile rows of a mask block, log2 group,
    log2 kept of it) of a variant."""
    form = tl.load(TABLE + at + FORM)
    group, kept = (form >> 8) & 15, (form >> 12) & 15
    outputs = tl.load(TABLE + at + OUTPUTS)
    outputs = tl.where(outputs > 0, outputs, base_outputs)
    columns = ((((K - 1) >> group) + 1 << kept) + 255) >> 8
    return tl.where(form > 0, outputs, 0), (outputs + 15) // 16, columns, form & 15, (form >> 4) & 15, group, kept


@triton.jit
def _prefetch_item(SLAB, TABLE, at, tile, base_outputs, K: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Bring an item's first values, 128 bytes for each lane, and places to the second-level cache."""
    outputs, tiles, columns, bits, tall, _, _ = _shape(TABLE, at, base_outputs, K)
    if tile * 16 < outputs:
        lane = tl.arange(0, WARPS * 32)
        pieces = tl.minimum(tiles - tile, WARPS * TILES) * (bits * columns * 4)
        values = parts.part(SLAB, TABLE, at, KEPT, tl.int32) + tile * (bits * columns * 128)
        prefetch(values + tl.minimum(lane, pieces - 1) * 32, tl.zeros_like(lane) + 128)
        places = parts.part(SLAB, TABLE, at, INPUTS, tl.int32) + tiles * 16
        block = tl.minimum(tile + tl.arange(0, WARPS) * TILES, tiles - 1) >> tall
        prefetch(places + block * (columns * 64), tl.zeros_like(block) + columns * 256)


@triton.jit
def compact_kernel(
    X, x_stride, SLAB, TABLE, table_stride, SEGMENTS, OUT, base_outputs, width, chunks,
    K: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, ADD: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT[row, n] of all rows of all segments, zero where a variant keeps nothing; with ADD, added to what is there.

    Grid [programs], which share the items evenly and in order. An item is WARPS * TILES tiles of a segment.

    Args:
        chunks: items of each segment. base_outputs, width: N of the base; columns of OUT, N or more.
        BITS: most that a variant's values have. TILES: no more than the tile rows of a mask block of any variant.
        EARLY: let the next kernel start at once, see `launches`.
    """
    if PDL and EARLY:
        gdc_launch_dependents()
    items = tl.load(SEGMENTS + 3) * chunks
    first, last = tl.program_id(0) * items // tl.num_programs(0), (tl.program_id(0) + 1) * items // tl.num_programs(0)
    lane = tl.arange(0, WARPS * 32)
    if PDL:
        if first < last:
            entry, _, _ = parts.segment(SEGMENTS, first // chunks)
            _prefetch_item(
                SLAB, TABLE, entry * table_stride, first % chunks * (WARPS * TILES), base_outputs, K, TILES, WARPS
            )  # fmt: skip
        gdc_wait()
    for s in range(first // chunks, (last + chunks - 1) // chunks):
        entry, start, stop = parts.segment(SEGMENTS, s)
        at = entry * table_stride
        outputs, tiles, columns, bits, tall, group, kept = _shape(TABLE, at, base_outputs, K)
        values_at = parts.part(SLAB, TABLE, at, KEPT, tl.int32)
        scales = parts.part(SLAB, TABLE, at, INPUTS, tl.float32)
        places = (scales + tiles * 16).to(tl.pointer_type(tl.int64))
        begin = tl.maximum(first - s * chunks, 0)
        found = _load_places(places, begin, 0, tl.where(outputs > 0, tiles, 0), tall, columns, TILES, WARPS)
        for item in range(begin, tl.minimum(last - s * chunks, chunks)):
            tile = item * (WARPS * TILES)
            n = tile * 16 + tl.arange(0, WARPS * TILES * 16)
            step = tl.load(scales + n, mask=n < outputs, other=0.0)
            for row in range(start, tl.where(tile * 16 < outputs, stop, start)):
                y = tl.zeros((WARPS * TILES * 16,), tl.float32)
                for c in range(columns):
                    low, high = found.to(tl.int32), (found >> 32).to(tl.int32)
                    # Of what comes next: x is gathered while this one's values are on their way.
                    more = c + 1 < columns
                    next_item = tl.where(more | (row + 1 < stop), item, item + 1)
                    found = _load_places(
                        places, next_item, tl.where(more, c + 1, 0), tiles, tall, columns, TILES, WARPS
                    )  # fmt: skip
                    values = _load_values(values_at, tile, tiles, bits, c, columns, BITS, TILES, WARPS)
                    # A loop, though it runs once: in a straight line the assembler asks for one word after another.
                    for once in range(row, row + 1 + (row >> 30)):
                        # 0, which the compiler does not know: it would work out every address before the loop.
                        hidden = once >> 30
                        column = (c * 256 + hidden + lane % 32) >> kept << group
                        planes, unit, total = gathered_planes(
                            X + once * x_stride, low + hidden, high + hidden, column, (32 + hidden >> kept) << group,
                            K, WARPS,
                        )  # fmt: skip
                        sums = 2 * _sums(values, planes, BITS, TILES, WARPS)
                        sums -= (((1 << bits) - 1) * total)[None, :, :, None]
                        part = tl.permute(sums.to(tl.float32) * unit[None, :, :, None], (1, 0, 3, 2))
                        y = tl.fma(tl.reshape(part, (WARPS * TILES * 16,)), step, y)
                out = OUT + row * width + n
                if ADD:
                    tl.store(out, y + tl.load(out, mask=n < outputs, other=0.0), mask=n < outputs)
                else:
                    tl.store(out, tl.where(n < outputs, y, 0.0), mask=n < width)
            if (tile * 16 >= outputs) & (not ADD):
                for row in range(start, stop):
                    tl.store(OUT + row * width + n, tl.zeros_like(n).to(tl.float32), mask=n < width)
    if PDL and not EARLY:
        gdc_launch_dependents()  # not before: see `launches`
