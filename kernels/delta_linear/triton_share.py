"""A program's share of a decode-sized linear: a range of the base's tiles, and a range of all variants' tiles of signs.

Every program of a launch runs at the same time and has as much to do as any other. All tiles of all segments stand in a
row, one segment after another, and each program takes a piece of that row: it crosses from one segment to the next a
few times at most, and loads the planes of a segment's rows once.

max(a - b, 0) is written max(a, b) - b: of the former the ptxas of Triton 3.6 made one instruction that added b.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_digits import digit_sums, load_digits
from kernels.delta_linear.triton_parts import COL, PLANES, SCALE, SIGN, ZERO
from kernels.delta_linear.triton_signs import load_planes, load_signs, places, sums

SEVERAL = tl.constexpr(8)
"""Rows that are multiplied at once where a variant has more than one"""
_MOST_STAGES = tl.constexpr(4)
"""Of several rows' tiles: what is under way there is enough long before shared memory is full"""
_MOST_REGISTERS = tl.constexpr(64)
"""That the planes of a program's row may take of every thread"""
_MOST_OF_SEVERAL = tl.constexpr(128)
"""That the digits of several rows may"""


@triton.jit
def prefetch(at, size):
    """Bring `size` bytes (a multiple of 16) from each of the pointers to the second-level cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2;\nmov.u32 $0, 0;", "=r,l,r", [at.to(tl.int64), size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def range_of(program, programs, total):
    """(from, to) of a program's share of so many: the first programs have one more where they do not come out even."""
    each, more = total // programs, total % programs
    first = program * each + tl.minimum(program, more)
    return first, first + each + (program < more).to(tl.int32)


@triton.jit
def program_of(one, programs, total):
    """Whose share one of them is in. There are at least as many as programs."""
    each, more = total // programs, total % programs
    longer = more * (each + 1)
    return tl.where(one < longer, one // (each + 1), more + (one - longer) // each)


@triton.jit
def _tiles(
    words, OUT, WORDS, first, stop, tile, end, width, outputs, SCALES, ZEROS, x_scale, x_sum, shifted, later,
    KB: tl.constexpr, START: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr, COPIES: tl.constexpr,
    SPREAD: tl.constexpr, ROWS: tl.constexpr, MANY: tl.constexpr, BEGUN: tl.constexpr, ENDS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """OUT[row, n] = (2 sums - x_sum) scale[row] scale[n] of rows first .. first + ROWS, tiles tile .. end.

    Args:
        words: signs of the variant's first tile. outputs: how many it has; OUT is 0 from there on, up to width.
        x_scale, x_sum: of the rows, in the shape of `places`.
        START, STEPS: which columns, in blocks and in steps of SPREAD. BEGUN: OUT holds the sums of those before, as
            integers; ENDS: none follow. With MANY planes it holds floats, to which every part adds.
        later, shifted: with MANY planes, this one adds to what earlier ones left; has zero terms, ZEROS of each output.
    """
    CHAINS: tl.constexpr = 4 if COPIES == TILES and STEPS >= 4 else 2 if STEPS >= 2 else 1
    if ROWS == 1:
        x = load_planes(WORDS, first, KB, START, STEPS, COPIES, SPREAD)
    else:
        x = load_digits(WORDS, first, stop, KB, START, STEPS, SPREAD)
    e = tl.arange(0, SPREAD * 128)[None, :]
    t = tl.arange(0, TILES)
    for this in tl.range(tile, end, TILES, num_stages=STAGES):
        words_at = words + (this + t)[:, None].to(tl.int64) * (KB * 128) + e
        signs = load_signs(words_at, (this + t < end)[:, None], KB, START, STEPS, SPREAD)
        if ROWS == 1:
            found = sums(signs, x, TILES, SPREAD, STEPS, CHAINS)
        else:
            found = digit_sums(signs, x, TILES, SPREAD, STEPS)
        _store(
            found, OUT, first, stop, this, end, width, outputs, SCALES, ZEROS, x_scale, x_sum, shifted, later,
            TILES, ROWS, MANY, BEGUN, ENDS,
        )  # fmt: skip


@triton.jit
def _store(
    found, OUT, first, stop, tile, end, width, outputs, SCALES, ZEROS, x_scale, x_sum, shifted, later,
    TILES: tl.constexpr, ROWS: tl.constexpr, MANY: tl.constexpr, BEGUN: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """What `_tiles` does with the sums of TILES tiles from one on, and rows first .. first + ROWS."""
    row, n = places(ROWS)
    row += first
    n += (tile + tl.arange(0, TILES))[:, None, None, None, None] * 16
    inside = n < tl.minimum(outputs, end * 16)
    mask = (row < stop) & (n < tl.minimum(width, end * 16))
    at = row.to(tl.int64) * width + n
    INTEGERS = OUT.to(tl.pointer_type(tl.int32), bitcast=True)
    if BEGUN and not MANY:
        found += tl.load(INTEGERS + at, mask=mask, other=0)
    if ENDS or MANY:
        scale = tl.load(SCALES + n, mask=inside, other=0.0)
        if MANY and BEGUN:
            y = (2 * found).to(tl.float32) * (x_scale * scale)
            y += tl.load(OUT + at, mask=mask, other=0.0)
        else:
            y = (2 * found - x_sum).to(tl.float32) * (x_scale * scale)
        if MANY and not BEGUN:
            y += tl.load(ZEROS + n, mask=inside & shifted, other=0.0) * (x_sum.to(tl.float32) * x_scale)
            y += tl.load(OUT + at, mask=mask & later, other=0.0)
        tl.store(OUT + at, tl.where(inside, y, 0.0), mask=mask)
    else:
        tl.store(INTEGERS + at, found, mask=mask)


@triton.jit
def _rows(
    words, OUT, WORDS, XSCALE, XSUM, first, stop, tile, end, width, outputs, SCALES, ZEROS, shifted, later,
    KB: tl.constexpr, TILES: tl.constexpr, COPIES: tl.constexpr, SPREAD: tl.constexpr, ROWS: tl.constexpr,
    MANY: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS of one plane: in as many parts of K as their registers ask for.

    ROOM: blocks of 16 x 256 signs that shared memory holds.
    """
    ALL: tl.constexpr = (KB + SPREAD - 1) // SPREAD
    MOST: tl.constexpr = _MOST_REGISTERS // 4 if ROWS == 1 else _MOST_OF_SEVERAL // 32
    PARTS: tl.constexpr = (ALL + MOST - 1) // MOST
    STEPS: tl.constexpr = (ALL + PARTS - 1) // PARTS
    BLOCKS: tl.constexpr = TILES * (STEPS * SPREAD if STEPS * SPREAD < KB else KB)
    STAGES: tl.constexpr = _MOST_STAGES if ROWS > 1 and ROOM // BLOCKS >= _MOST_STAGES else 1 + (ROOM // BLOCKS or 1)
    row, _ = places(ROWS)
    there = tl.minimum(first + row, stop - 1)
    x_scale = tl.load(XSCALE + there)
    x_sum = tl.load(XSUM + there)
    for part in tl.static_range(PARTS):
        if part > 0:
            tl.debug_barrier()  # it reads what other threads wrote
        _tiles(
            words, OUT, WORDS, first, stop, tile, end, width, outputs, SCALES, ZEROS, x_scale, x_sum, shifted, later,
            KB, part * STEPS * SPREAD, STEPS, TILES, COPIES, SPREAD, ROWS, MANY, part > 0, part == PARTS - 1, STAGES,
        )  # fmt: skip


@triton.jit
def _plane(
    words, OUT, WORDS, XSCALE, XSUM, start, stop, tile, end, width, outputs, SCALES, ZEROS, shifted, later,
    KB: tl.constexpr, TILES: tl.constexpr, SPREAD: tl.constexpr, WARPS: tl.constexpr, MANY: tl.constexpr,
    LONGEST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All rows of a segment, one plane. Several rows are multiplied eight at once: all warps share a tile's columns
    then, and meet once for so many tiles that each has 128 products in between (K = 4096)."""
    COPIES: tl.constexpr = 1 if SPREAD == WARPS else TILES
    if LONGEST == 1:
        _rows(
            words, OUT, WORDS, XSCALE, XSUM, start, stop, tile, end, width, outputs, SCALES, ZEROS, shifted, later,
            KB, TILES, COPIES, SPREAD, 1, MANY, (STAGES - 1) * TILES * KB,
        )  # fmt: skip
    else:
        for first in range(start, stop, SEVERAL):
            if stop - first == 1:
                _rows(
                    words, OUT, WORDS, XSCALE, XSUM, first, stop, tile, end, width, outputs, SCALES, ZEROS, shifted,
                    later, KB, TILES, COPIES, SPREAD, 1, MANY, (STAGES - 1) * TILES * KB,
                )  # fmt: skip
            else:
                _rows(
                    words, OUT, WORDS, XSCALE, XSUM, first, stop, tile, end, width, outputs, SCALES, ZEROS, shifted,
                    later, KB, WARPS // 2, 1, WARPS, SEVERAL, MANY, (STAGES - 1) * TILES * KB,
                )  # fmt: skip
            tl.debug_barrier()


@triton.jit
def _piece(
    SLAB, TABLE, at, words, outputs, start, stop, member, tile, end, WORDS, XSCALE, XSUM, words_stride, scale_stride,
    OUT, width,
    KB: tl.constexpr, TILES: tl.constexpr, SPREAD: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles tile .. end, of one member, of one segment: all planes."""
    scales = parts.part(SLAB, TABLE, at, SCALE, tl.float32)
    if MANY or COLUMNS:
        zeros = parts.part(SLAB, TABLE, at, ZERO, tl.float32)
        padded = (outputs + 15) // 16
        for plane in range(tl.load(TABLE + at + PLANES)):
            sets = plane * 0
            if COLUMNS:
                sets = tl.where(parts.has(TABLE, at, COL), plane * MEMBERS + member, 0)
            shifted = (plane == 0) & parts.has(TABLE, at, ZERO)
            _plane(
                words + plane * (padded * (KB * 128)), OUT, WORDS + sets * words_stride, XSCALE + sets * scale_stride,
                XSUM + sets * scale_stride, start, stop, tile, end, width, outputs, scales + plane * (padded * 16),
                zeros, shifted, plane > 0, KB, TILES, SPREAD, WARPS, True, LONGEST, STAGES,
            )  # fmt: skip
            tl.debug_barrier()
    else:
        _plane(
            words, OUT, WORDS, XSCALE, XSUM, start, stop, tile, end, width, outputs, scales, scales, False, False,
            KB, TILES, SPREAD, WARPS, False, LONGEST, STAGES,
        )  # fmt: skip


@triton.jit
def _zeros(OUT, start, stop, tile, end, width):
    """Where a variant has no signs."""
    n = tl.arange(0, 256)
    for row in range(start, stop):
        for first in range(tile * 16, tl.minimum(end * 16, width), 256):
            inside = first + n < tl.minimum(end * 16, width)
            tl.store(OUT + row * width + first + n, tl.zeros_like(n).to(tl.float32), mask=inside)


@triton.jit
def _segment_of(SLAB, TABLE, table_stride, SEGMENTS, g, base_outputs):
    """(its entry's place in the table, start, stop, outputs that have signs, pointer to them). Of a negative segment
    nothing that may be read."""
    entry, start, stop = parts.segment(SEGMENTS, tl.maximum(g, 0))
    at = entry * table_stride
    own = tl.load(TABLE + at + parts.OUTPUTS)
    outputs = tl.where(own > 0, own, base_outputs)
    there = parts.has(TABLE, at, SIGN) & parts.has(TABLE, at, SCALE) & (tl.load(TABLE + at + PLANES) > 0)
    return at, start, stop, tl.where(there, outputs, 0), parts.part(SLAB, TABLE, at, SIGN, tl.int32)


@triton.jit
def _request(words, tile, last, KB: tl.constexpr, TILES: tl.constexpr):
    """Ask for the signs of TILES tiles from one on, as far as the last."""
    t = tl.minimum(tile + tl.arange(0, TILES), last)
    prefetch(words + t.to(tl.int64) * (KB * 128), tl.zeros_like(t) + KB * 512)


@triton.jit
def base_share(
    X, W, OUT, program, T, N, width,
    PROGRAMS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x W^T of a program's share of all steps of BK along K of all tiles of BN outputs, a step after the other.

    A tile that programs share has a partial of each, in turn: OUT[i, t, n] is the i-th's, and 0 from their number on
    and for n >= N.

    Args:
        PROGRAMS: at most as many as there are steps. SPLIT: the most that share a tile, or more.
    """
    STEPS: tl.constexpr = (K + BK - 1) // BK
    steps = (width + BN - 1) // BN * STEPS
    lo, hi = range_of(program, PROGRAMS, steps)
    t = tl.arange(0, BT)
    k = tl.arange(0, BK)
    for tile in range(lo // STEPS, (hi + STEPS - 1) // STEPS):
        before = tile * STEPS
        first, last = tl.maximum(lo, before) - before, tl.minimum(hi - before, STEPS)  # see above
        n = tile * BN + tl.arange(0, BN)
        w_at = W + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
        x_at = X + t[None, :] * K + k[:, None]
        y = tl.zeros((BN, BT), tl.float32)
        for done in tl.range(first * BK, last * BK, BK, num_stages=STAGES):
            if K % BK == 0:
                w = tl.load(w_at + done, eviction_policy="evict_first")
                x = tl.load(x_at + done, mask=t[None, :] < T, other=0.0)
            else:
                w = tl.load(w_at + done, mask=k[None, :] < K - done, other=0.0, eviction_policy="evict_first")
                x = tl.load(x_at + done, mask=(t[None, :] < T) & (k[:, None] < K - done), other=0.0)
            y = tl.dot(w, x, y, input_precision="ieee")
        sharing = program - program_of(before, PROGRAMS, steps)
        at = OUT + (sharing * T + t)[None, :].to(tl.int64) * width + n[:, None]
        mask = (t[None, :] < T) & (n[:, None] < width)
        tl.store(at, tl.where(n[:, None] < N, y, 0.0), mask=mask)
        if last == STEPS:
            for more in range(sharing + 1, SPLIT):
                at = OUT + (more * T + t)[None, :].to(tl.int64) * width + n[:, None]
                tl.store(at, tl.zeros((BN, BT), tl.float32), mask=mask)


@triton.jit
def sign_share(
    SLAB, TABLE, table_stride, SEGMENTS, program, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT,
    base_outputs, width, M1, M2,
    PROGRAMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, SPREAD: tl.constexpr, WARPS: tl.constexpr,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """OUT[row, n] of the program's tiles of all segments' rows, zero where a variant has no signs.

    Args:
        program, PROGRAMS: which of how many share the tiles.
        base_outputs, width: N of the base; columns of OUT, N or more.
        M1, M2: first tiles of the second and third member, all tiles where there are none. MEMBERS: 1 where COLUMNS
            is not set: members matter for column scales alone.
        TILES: multiplied at once. SPREAD: warps that share the columns of a row's tile; a power of two, of WARPS.
        LONGEST: 1 where no segment has more rows than that.
        STAGES: Triton's: how many steps of TILES of a row there are, at various stages; those of several rows take no
            more room.
        PDL: whether the chip has what asks ahead.
    """
    tiles = (width + 15) // 16
    segments = tl.load(SEGMENTS + 3)
    lo, hi = range_of(program, PROGRAMS, segments * tiles)
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, start, stop, outputs, words = _segment_of(SLAB, TABLE, table_stride, SEGMENTS, g, base_outputs)
        before = g * tiles
        tile, end = tl.maximum(lo, before) - before, tl.minimum(hi - before, tiles)  # see above
        if PDL:
            # Looked up here and again in the next turn: Triton 3.6 lost one of the values when they were carried over.
            next_g = tl.minimum(g + 1, segments - 1)
            _, _, _, signed_2, words_2 = _segment_of(SLAB, TABLE, table_stride, SEGMENTS, next_g, base_outputs)
            if (hi > before + tiles) & (signed_2 > 0):
                _request(words_2, 0, (signed_2 + 15) // 16 - 1, KB, TILES)
        signed = tl.minimum(end, (outputs + 15) // 16)
        for member in range(MEMBERS):
            from_tile, to_tile = tile, signed
            if MEMBERS > 1:
                from_tile = tl.maximum(tile, tl.where(member == 0, 0, tl.where(member == 1, M1, M2)))
                to_tile = tl.minimum(signed, tl.where(member == 0, M1, tl.where(member == 1, M2, tiles)))
            if from_tile < to_tile:
                _piece(
                    SLAB, TABLE, at, words, outputs, start, stop, member, from_tile, to_tile, WORDS, XSCALE, XSUM,
                    words_stride, scale_stride, OUT, width,
                    KB, TILES, SPREAD, WARPS, MEMBERS, COLUMNS, MANY, LONGEST, STAGES,
                )  # fmt: skip
        _zeros(OUT, start, stop, tl.maximum(tile, signed), end, width)
