"""Decode-sized products with sign planes on the binary tensor core (compute capability 8.0 to 9.x).

`mma.m16n8k256 and.popc` multiplies 16 outputs x 256 signs, as they lie in memory (`kernels.fragments`), with 8 columns
of 256 bits: bit planes of the rows' 16-bit fixed point (`kernels.device.Planes`). With signs as bits b and rows as
q = sum_p 2^p plane_p - 2^16 plane_15, sum +-q = 2 sum_p weight_p popcount(b & plane_p) - sum q: exact in 32 bits.

The 8 columns are R rows x 8 / R planes, so that 1, 4 and 8 rows of one variant cost 2, 8 and 16 instructions a tile,
without waste. From 4 on, planes are taken from the highest down and the sums doubled in between (Horner), so that a few
registers hold the rows' products and nothing is summed over lanes. About 8 rows of one variant cost as much time as
reading its signs; more of them reuse the signs in registers.

An item is TILES tiles of 16 outputs of one segment, all of K, which a program's warps share out. A program takes one
item after another and asks for the next one's signs before it multiplies with the last one's, so that some are always
under way: what an item waits for in a row (its segment, its table, its signs) would else leave the memory idle.
Variants of several planes or with column scales are taken one plane at a time, without that.

Not covered: chips whose `mma.b1` is emulated or gone (`triton_unpack`). `xor.popc`, which would save the identity
above, is emulated everywhere from 9.0 on.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import COL, PLANES, SCALE, SIGN, ZERO

_MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    " {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$0,$1,$2,$3};\n"
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    " {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$14,$15}, {$4,$5,$6,$7};"
)
_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 8 + [str(i) for i in range(8)]))


@triton.jit
def multiply(signs, planes, low, high):
    """low += signs x the first two words of planes, high += signs x the last two; int32 [TILES, WARPS * 128], of which
    a lane holds 4 words that follow each other. Never pure: the compiler may not move it out of a uniform flow."""
    return tl.inline_asm_elementwise(
        _MMA, _OPERANDS, [signs, planes, low, high], dtype=(tl.int32, tl.int32), is_pure=False, pack=4
    )


@triton.jit
def _load_signs(at, tile, tiles, KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr):
    """A tuple of int32 [TILES, WARPS * 128], one for each step along K; anything where K has ended, or where the first
    tile is not among the tiles. Tiles beyond the last repeat it."""
    e = tl.arange(0, WARPS * 128)[None, :]
    t = tl.minimum(tile + tl.arange(0, TILES), tiles - 1)[:, None].to(tl.int64)
    room = tl.where(tile < tiles, KB * 128, 0)
    signs = ()
    for s in tl.static_range((KB + WARPS - 1) // WARPS):
        words = at + t * (KB * 128) + (s * WARPS * 128 + e)
        inside = (e < room - s * WARPS * 128) & (t >= 0)
        signs = signs + (tl.load(words, mask=inside, eviction_policy="evict_first"),)
    return signs


@triton.jit
def _load_planes(WORDS, first, stop, p, KB: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """Planes p + ROWS * i and 8 more, i < 8 / ROWS, of rows first .. first + ROWS, for all steps along K; rows beyond
    the last repeat it."""
    e = tl.arange(0, WARPS * 128)
    column = e // 16 % 8
    row = tl.minimum(first + column % ROWS, stop - 1)
    words = WORDS + row * (KB * 128) + e // 128 * 128 + (column // ROWS * ROWS + p) * 16 + e % 16
    planes = ()
    for s in tl.static_range((KB + WARPS - 1) // WARPS):
        if (s + 1) * WARPS <= KB:
            planes = planes + (tl.load(words + s * WARPS * 128)[None, :],)
        else:
            inside = e < (KB - s * WARPS) * 128
            planes = planes + (tl.load(words + s * WARPS * 128, mask=inside, other=0)[None, :],)
    return planes


@triton.jit
def _multiply_all(signs, planes, low, high, TILES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    for s in tl.static_range(STEPS):
        low, high = multiply(signs[s], tl.broadcast_to(planes[s], (TILES, WIDTH)), low, high)
    return low, high


@triton.jit
def _sums(
    signs, planes, WORDS, first, stop,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sum_k b[n, k] q[row, k]: int32 [ROWS, TILES * 16], of one group's tiles.

    Args:
        planes: the highest, `_load_planes` of ROWS - 1.
    """
    WIDTH: tl.constexpr = WARPS * 128
    STEPS: tl.constexpr = (KB + WARPS - 1) // WARPS
    low = tl.zeros((TILES, WIDTH), tl.int32)
    high = tl.zeros((TILES, WIDTH), tl.int32)
    e = tl.arange(0, WIDTH)[None, :]
    column = e // 4 % 4 * 2 + e % 2
    weight = 1 << (column // ROWS * ROWS)
    if ROWS == 1:
        low, high = _multiply_all(signs, planes, low, high, TILES, WIDTH, STEPS)
        total = low * weight + high * tl.where(column == 7, -32768, weight * 256)
    else:
        low, high = _multiply_all(signs, planes, low, high, TILES, WIDTH, STEPS)
        high = tl.where(column // ROWS == 8 // ROWS - 1, -high, high)  # plane 15 counts -2^15
        for left in range(ROWS - 2, -1, -1):
            planes = _load_planes(WORDS, first, stop, left, KB, WARPS, ROWS)
            low, high = _multiply_all(signs, planes, low + low, high + high, TILES, WIDTH, STEPS)
        total = (low + high * 256) * weight
    return _gather(total, TILES, WARPS, ROWS)


@triton.jit
def _gather(total, TILES: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """From an accumulator's fragments to [ROWS, TILES * 16]: sums over warps and over the planes of a row."""
    if ROWS == 1:
        lanes = tl.sum(tl.reshape(total, (TILES, WARPS, 8, 4, 2, 2)), 5)
        rows = tl.permute(tl.sum(tl.sum(lanes, 3), 1), (0, 2, 1))  # TILES, half, g
    elif ROWS == 4:
        lanes = tl.sum(tl.reshape(total, (TILES, WARPS, 8, 2, 2, 2, 2)), 3)
        rows = tl.permute(tl.sum(lanes, 1), (2, 4, 0, 3, 1))  # pair of rows, row of the pair, TILES, half, g
    else:
        lanes = tl.reshape(total, (TILES, WARPS, 8, 4, 2, 2))
        rows = tl.permute(tl.sum(lanes, 1), (2, 4, 0, 3, 1))
    return tl.reshape(rows, (ROWS, TILES * 16))


@triton.jit
def _store_rows(
    sums, OUT, row, stop, n, outputs, limit, width, scale, x_scale, x_sum, zero, plane,
    MANY: tl.constexpr,
):  # fmt: skip
    """OUT[row, n] = (2 sums - sum q) scale[row] scale[n]; planes after the first add to what is there.

    Args:
        n: output of each column of sums. outputs: how many the variant has; zeros follow, up to `limit`.
        width: columns of OUT.
        zero: of each output, for the first plane. MANY: whether a variant may have several planes.
    """
    y = (2 * sums - x_sum[:, None]).to(tl.float32) * (x_scale[:, None] * scale[None, :])
    at = OUT + row[:, None].to(tl.int64) * width + n[None, :]
    if MANY:
        y += zero[None, :] * (x_sum.to(tl.float32) * x_scale)[:, None]
        later = (row[:, None] < stop) & (n[None, :] < tl.where(plane > 0, limit, 0))
        y += tl.load(at, mask=later, other=0.0)
    tl.store(at, tl.where(n[None, :] < outputs, y, 0.0), mask=(row[:, None] < stop) & (n[None, :] < limit))


@triton.jit
def _row_values(XSCALE, XSUM, first, stop, ROWS: tl.constexpr):
    there = tl.minimum(first + tl.arange(0, ROWS), stop - 1)
    return tl.load(XSCALE + there), tl.load(XSUM + there)


@triton.jit
def _some_rows(
    signs, WORDS, XSCALE, XSUM, OUT, first, stop, tile, outputs, limit, width, scale, zero, plane,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS of one plane, as far as stop."""
    x_scale, x_sum = _row_values(XSCALE, XSUM, first, stop, ROWS)
    planes = _load_planes(WORDS, first, stop, ROWS - 1, KB, WARPS, ROWS)
    sums = _sums(signs, planes, WORDS, first, stop, KB, TILES, WARPS, ROWS)
    row = first + tl.arange(0, ROWS)
    n = tile * 16 + tl.arange(0, TILES * 16)
    _store_rows(sums, OUT, row, stop, n, outputs, limit, width, scale, x_scale, x_sum, zero, plane, MANY)


@triton.jit
def _rows(
    signs, WORDS, XSCALE, XSUM, OUT, start, stop, tile, outputs, limit, width, scale, zero, plane,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """All rows of one plane, as many at a time as there are, up to 8."""
    if stop - start == 1:
        _some_rows(
            signs, WORDS, XSCALE, XSUM, OUT, start, stop, tile, outputs, limit, width, scale, zero, plane,
            KB, TILES, WARPS, MANY, 1,
        )  # fmt: skip
    elif LONGEST > 1:
        if (stop - start <= 4) | (LONGEST <= 4):
            for first in range(start, stop, 4):
                _some_rows(
                    signs, WORDS, XSCALE, XSUM, OUT, first, stop, tile, outputs, limit, width, scale, zero, plane,
                    KB, TILES, WARPS, MANY, 4,
                )  # fmt: skip
        else:
            for first in range(start, stop, 8):
                _some_rows(
                    signs, WORDS, XSCALE, XSUM, OUT, first, stop, tile, outputs, limit, width, scale, zero, plane,
                    KB, TILES, WARPS, MANY, 8,
                )  # fmt: skip


@triton.jit
def member_of(block, M1, M2, tiles, MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """(member, first tile, tile after the member's last) of a block of BLOCK tiles; none has tiles of two members.

    Args:
        M1, M2: first tiles of the second and third member, `tiles` where there are none. tiles: of all.
    """
    member, tile, stop = block * 0, block * BLOCK, tiles
    if MEMBERS > 1:
        first = (M1 + BLOCK - 1) // BLOCK
        second = (M2 - M1 + BLOCK - 1) // BLOCK
        member = (block >= first).to(tl.int32) + (block >= first + second).to(tl.int32)
        start = tl.where(member == 0, 0, tl.where(member == 1, M1, M2))
        skipped = tl.where(member == 0, 0, tl.where(member == 1, first, first + second))
        tile = start + (block - skipped) * BLOCK
        stop = tl.where(member == 0, M1, tl.where(member == 1, M2, tiles))
    return member, tile, stop


@triton.jit
def _item(SLAB, TABLE, table_stride, SEGMENTS, i, items, blocks, base_outputs, TILES: tl.constexpr):
    """(start, stop, tile, outputs, words, scales) of an item: rows; first tile; how many outputs have signs, the others
    are zeros; where signs and scales lie. Beyond the last item there are no rows and no outputs."""
    last = tl.maximum(tl.minimum(i, items - 1), 0)
    entry, start, stop = parts.segment(SEGMENTS, last // blocks)
    at = entry * table_stride
    outputs = tl.load(TABLE + at + parts.OUTPUTS)
    outputs = tl.where(outputs > 0, outputs, base_outputs)
    there = parts.has(TABLE, at, SIGN) & parts.has(TABLE, at, SCALE) & (tl.load(TABLE + at + PLANES) > 0)
    words = parts.part(SLAB, TABLE, at, SIGN, tl.int32)
    scales = parts.part(SLAB, TABLE, at, SCALE, tl.float32)
    here = (i < items) & (entry > 0)
    stop = tl.where(here, stop, start)
    return start, stop, last % blocks * TILES, tl.where(here & there, outputs, 0), words, scales


@triton.jit
def _parts(tile, outputs, words, scales, KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr):
    n = tile * 16 + tl.arange(0, TILES * 16)
    signs = _load_signs(words, tile, (outputs + 15) // 16, KB, TILES, WARPS)
    return signs, tl.load(scales + n, mask=n < outputs, other=0.0)


@triton.jit
def _one_plane(
    SLAB, TABLE, table_stride, SEGMENTS, program, programs, blocks, WORDS, XSCALE, XSUM, OUT, base_outputs, width,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, LONGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th item, of variants of one plane without column scales."""
    items = tl.load(SEGMENTS + 3) * blocks
    start, stop, tile, outputs, words, scales = _item(
        SLAB, TABLE, table_stride, SEGMENTS, program, items, blocks, base_outputs, TILES
    )  # fmt: skip
    signs, scale = _parts(tile, outputs, words, scales, KB, TILES, WARPS)
    start_2, stop_2, tile_2, outputs_2, words, scales = _item(
        SLAB, TABLE, table_stride, SEGMENTS, program + programs, items, blocks, base_outputs, TILES
    )  # fmt: skip
    if PDL:
        gdc_wait()
    for i in range(program, items, programs):
        signs_2, scale_2 = _parts(tile_2, outputs_2, words, scales, KB, TILES, WARPS)
        start_3, stop_3, tile_3, outputs_3, words, scales = _item(
            SLAB, TABLE, table_stride, SEGMENTS, i + 2 * programs, items, blocks, base_outputs, TILES
        )  # fmt: skip
        _rows(
            signs, WORDS, XSCALE, XSUM, OUT, start, stop, tile, outputs, width, width, scale, scale, 0,
            KB, TILES, WARPS, False, LONGEST,
        )  # fmt: skip
        signs, scale, start, stop, tile, outputs = signs_2, scale_2, start_2, stop_2, tile_2, outputs_2
        start_2, stop_2, tile_2, outputs_2 = start_3, stop_3, tile_3, outputs_3


@triton.jit
def _any_planes(
    SLAB, TABLE, table_stride, SEGMENTS, g, block, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT,
    base_outputs, width, M1, M2,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """One item, plane by plane."""
    entry, start, stop = parts.segment(SEGMENTS, g)
    if (stop > start) & (entry > 0):
        at = entry * table_stride
        outputs = tl.load(TABLE + at + parts.OUTPUTS)
        outputs = tl.where(outputs > 0, outputs, base_outputs)
        there = parts.has(TABLE, at, SIGN) & parts.has(TABLE, at, SCALE)
        planes = tl.where(there, tl.load(TABLE + at + PLANES), 0)
        tiles = (outputs + 15) // 16
        member, tile, member_stop = member_of(block, M1, M2, (width + 15) // 16, MEMBERS, TILES)
        # Where a member's last item goes beyond it, the next member's first writes instead.
        limit = tl.minimum(member_stop * 16, width)
        if (planes > 0) & (tile < tiles):
            for plane in range(planes):
                _plane(
                    SLAB, TABLE, at, plane, member, tile, tiles, start, stop, WORDS, XSCALE, XSUM, words_stride,
                    scale_stride, OUT, outputs, limit, width,
                    KB, TILES, WARPS, MEMBERS, COLUMNS, MANY, LONGEST,
                )  # fmt: skip
        else:
            n = tile * 16 + tl.arange(0, TILES * 16)
            for row in range(start, stop):
                tl.store(OUT + row * width + n, tl.zeros_like(n).to(tl.float32), mask=n < limit)


@triton.jit
def _plane(
    SLAB, TABLE, at, plane, member, tile, tiles, start, stop, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT,
    outputs, limit, width,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    words = parts.part(SLAB, TABLE, at, SIGN, tl.int32) + plane * tiles * (KB * 128)
    signs = _load_signs(words, tile, tiles, KB, TILES, WARPS)
    n = tile * 16 + tl.arange(0, TILES * 16)
    scales = parts.part(SLAB, TABLE, at, SCALE, tl.float32) + plane * tiles * 16
    scale = tl.load(scales + n, mask=n < tiles * 16, other=0.0)
    zero = scale
    if MANY:
        first = tl.where((plane == 0) & parts.has(TABLE, at, ZERO), tiles * 16, 0)
        zero = tl.load(parts.part(SLAB, TABLE, at, ZERO, tl.float32) + n, mask=n < first, other=0.0)
    if COLUMNS:
        sets = tl.where(parts.has(TABLE, at, COL), plane * MEMBERS + member, 0)
        WORDS += sets * words_stride
        XSCALE += sets * scale_stride
        XSUM += sets * scale_stride
    _rows(
        signs, WORDS, XSCALE, XSUM, OUT, start, stop, tile, outputs, limit, width, scale, zero, plane,
        KB, TILES, WARPS, MANY, LONGEST,
    )  # fmt: skip
    if MANY:
        tl.debug_barrier()  # the next plane adds to what this one wrote


@triton.jit
def sign_items(
    SLAB, TABLE, table_stride, SEGMENTS, program, programs, blocks, WORDS, XSCALE, XSUM, words_stride, scale_stride,
    OUT, base_outputs, width, M1, M2,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr, LONGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT[row, n] of all rows of a program's items, zero where a variant has no signs.

    Args:
        program, programs: which of how many share the items.
        blocks: items of each segment.
        base_outputs, width: N of the base; columns of OUT, N or more.
        M1, M2: see `member_of`. MEMBERS: 1 where COLUMNS is not set.
        LONGEST: most rows that a segment may have: 1, 4, or any number.
    """
    if MANY or COLUMNS:
        if PDL:
            gdc_wait()
        for i in range(program, tl.load(SEGMENTS + 3) * blocks, programs):
            _any_planes(
                SLAB, TABLE, table_stride, SEGMENTS, i // blocks, i % blocks, WORDS, XSCALE, XSUM, words_stride,
                scale_stride, OUT, base_outputs, width, M1, M2,
                KB, TILES, WARPS, MEMBERS, COLUMNS, MANY, LONGEST,
            )  # fmt: skip
    else:
        _one_plane(
            SLAB, TABLE, table_stride, SEGMENTS, program, programs, blocks, WORDS, XSCALE, XSUM, OUT, base_outputs,
            width, KB, TILES, WARPS, LONGEST, PDL,
        )  # fmt: skip


@triton.jit
def sign_kernel(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, base_outputs, width,
    blocks, M1, M2,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr, LONGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [programs]."""
    if PDL:
        gdc_launch_dependents()
    sign_items(
        SLAB, TABLE, table_stride, SEGMENTS, tl.program_id(0), tl.num_programs(0), blocks, WORDS, XSCALE, XSUM,
        words_stride, scale_stride, OUT, base_outputs, width, M1, M2,
        KB, TILES, WARPS, MEMBERS, COLUMNS, MANY, LONGEST, PDL,
    )  # fmt: skip
