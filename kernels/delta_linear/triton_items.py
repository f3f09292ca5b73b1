"""Decode-sized sign products, item by item: see `triton_signs`."""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import COL, PLANES, SCALE, SIGN, ZERO
from kernels.delta_linear.triton_signs import load_planes, load_signs, some_rows, store_rows, sums


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
def _item(
    SLAB, TABLE, table_stride, SEGMENTS, i, items, blocks, base_outputs, width, M1, M2,
    MEMBERS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(at, start, stop, member, tile, limit, outputs, planes) of an item: its place in the table; rows; first tile;
    where the outputs that it writes end; how many of them have signs. Beyond the last item there are no rows."""
    last = tl.maximum(tl.minimum(i, items - 1), 0)
    entry, start, stop = parts.segment(SEGMENTS, last // blocks)
    at = entry * table_stride
    outputs = tl.load(TABLE + at + parts.OUTPUTS)
    outputs = tl.where(outputs > 0, outputs, base_outputs)
    there = parts.has(TABLE, at, SIGN) & parts.has(TABLE, at, SCALE)
    planes = tl.where(there, tl.load(TABLE + at + PLANES), 0)
    member, tile, member_stop = member_of(last % blocks, M1, M2, (width + 15) // 16, MEMBERS, TILES)
    # Where a member's last item goes beyond it, the next member's first writes instead.
    limit = tl.minimum(member_stop * 16, width)
    stop = tl.where((i < items) & (entry > 0), stop, start)
    return at, start, stop, member, tile, limit, tl.where(planes > 0, outputs, 0), planes


@triton.jit
def _scales(SLAB, TABLE, at, plane, tile, outputs, TILES: tl.constexpr):
    n = tile * 16 + tl.arange(0, TILES * 16)
    scales = parts.part(SLAB, TABLE, at, SCALE, tl.float32) + plane * ((outputs + 15) // 16 * 16)
    return tl.load(scales + n, mask=n < outputs, other=0.0)


@triton.jit
def _zeros(SLAB, TABLE, at, plane, tile, outputs, TILES: tl.constexpr):
    """Only the first plane has them."""
    n = tile * 16 + tl.arange(0, TILES * 16)
    end = tl.where((plane == 0) & parts.has(TABLE, at, ZERO), outputs, 0)
    return tl.load(parts.part(SLAB, TABLE, at, ZERO, tl.float32) + n, mask=n < end, other=0.0)


@triton.jit
def _one_row(
    words, SLAB, TABLE, at, plane, start, stop, tile, limit, outputs, WORDS, x_scale, x_sum, OUT, width, scale,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """An item of one row.

    A loop, though it runs once: what it takes in must have been asked for before. In a straight line the assembler
    saves registers by asking for signs one after another.
    """
    signs = load_signs(words, tile, (outputs + 15) // 16, KB, TILES, WARPS)
    for row in range(start, stop):
        planes = load_planes(WORDS, row, stop, 0, KB, WARPS, 1)
        found = sums(signs, planes, WORDS, row, stop, KB, TILES, WARPS, 1)
        zero = scale
        if MANY:
            zero = _zeros(SLAB, TABLE, at, plane, tile, outputs, TILES)
        n, one = tile * 16 + tl.arange(0, TILES * 16), tl.arange(0, 1)
        store_rows(
            found, OUT, row + one, stop, n, outputs, limit, width, scale, x_scale + one.to(tl.float32), x_sum + one,
            zero, plane, MANY,
        )  # fmt: skip


@triton.jit
def _several_rows(
    words, SLAB, TABLE, at, plane, start, stop, tile, limit, outputs, WORDS, XSCALE, XSUM, OUT, width,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """TILES of an item's, all rows, 4 or 8 at a time."""
    signs = load_signs(words, tile, (outputs + 15) // 16, KB, TILES, WARPS)
    scale = _scales(SLAB, TABLE, at, plane, tile, outputs, TILES)
    zero = scale
    if MANY:
        zero = _zeros(SLAB, TABLE, at, plane, tile, outputs, TILES)
    if (stop - start <= 4) | (LONGEST <= 4):
        for first in range(start, stop, 4):
            some_rows(
                signs, WORDS, XSCALE, XSUM, OUT, first, stop, tile, outputs, limit, width, scale, zero, plane,
                KB, TILES, WARPS, MANY, 4,
            )  # fmt: skip
    else:
        for first in range(start, stop, 8):
            some_rows(
                signs, WORDS, XSCALE, XSUM, OUT, first, stop, tile, outputs, limit, width, scale, zero, plane,
                KB, TILES, WARPS, MANY, 8,
            )  # fmt: skip


@triton.jit
def _plane(
    words, SLAB, TABLE, at, plane, start, stop, tile, limit, outputs, WORDS, XSCALE, XSUM, x_scale, x_sum, OUT, width,
    scale,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """An item's rows, of one plane. The sums of several rows take the registers of half of the signs.

    Args:
        x_scale, x_sum, scale: of the first row and of this plane.
    """
    HALF: tl.constexpr = (TILES + 1) // 2
    if stop - start == 1:
        _one_row(
            words, SLAB, TABLE, at, plane, start, stop, tile, limit, outputs, WORDS, x_scale, x_sum, OUT, width,
            scale, KB, TILES, WARPS, MANY,
        )  # fmt: skip
    elif LONGEST > 1:
        for this in range(tile, tl.minimum(tile + TILES, (limit + 15) // 16), HALF):
            _several_rows(
                words, SLAB, TABLE, at, plane, start, stop, this, limit, outputs, WORDS, XSCALE, XSUM, OUT, width,
                KB, HALF, WARPS, MANY, LONGEST,
            )  # fmt: skip


@triton.jit
def _planes(
    words, SLAB, TABLE, at, planes, start, stop, member, tile, limit, outputs, WORDS, XSCALE, XSUM, words_stride,
    scale_stride, OUT, width,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """An item of a variant of several planes, or with column scales."""
    for plane in range(planes):
        sets = plane * 0
        if COLUMNS:
            sets = tl.where(parts.has(TABLE, at, COL), plane * MEMBERS + member, 0)
        own_scale, own_sum = XSCALE + sets * scale_stride, XSUM + sets * scale_stride
        own_words = words + plane * ((outputs + 15) // 16 * (KB * 128))
        x_scale, x_sum = tl.load(own_scale + start), tl.load(own_sum + start)
        scale = _scales(SLAB, TABLE, at, plane, tile, outputs, TILES)
        _plane(
            own_words, SLAB, TABLE, at, plane, start, stop, tile, limit, outputs, WORDS + sets * words_stride,
            own_scale, own_sum, x_scale, x_sum, OUT, width, scale, KB, TILES, WARPS, MANY, LONGEST,
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

    What an item needs beside signs and planes is asked for while the one before is worked on, and carried over: the
    assembler would else ask for it where it is used, after everything else.

    Args:
        program, programs: which of how many share the items.
        blocks: items of each segment.
        base_outputs, width: N of the base; columns of OUT, N or more.
        M1, M2: see `member_of`. MEMBERS: 1 where COLUMNS is not set.
        LONGEST: most rows that a segment may have: 1, 4, or 8 (`SEGMENT_ROWS`; more would be right, and slow).
    """
    items = tl.load(SEGMENTS + 3) * blocks
    at, start, stop, member, tile, limit, outputs, planes = _item(
        SLAB, TABLE, table_stride, SEGMENTS, program, items, blocks, base_outputs, width, M1, M2, MEMBERS, TILES
    )  # fmt: skip
    words = parts.part(SLAB, TABLE, at, SIGN, tl.int32)
    scale = _scales(SLAB, TABLE, at, 0, tile, outputs, TILES)
    if PDL:
        if (stop > start) & (tile * 16 < outputs):
            _prefetch_signs(words, tile, (outputs + 15) // 16, KB, TILES)
        gdc_wait()
    x_scale, x_sum = tl.load(XSCALE + start), tl.load(XSUM + start)
    for i in range(program, items, programs):
        at_2, start_2, stop_2, member_2, tile_2, limit_2, outputs_2, planes_2 = _item(
            SLAB, TABLE, table_stride, SEGMENTS, i + programs, items, blocks, base_outputs, width, M1, M2, MEMBERS,
            TILES,
        )  # fmt: skip
        words_2 = parts.part(SLAB, TABLE, at_2, SIGN, tl.int32)
        scale_2 = _scales(SLAB, TABLE, at_2, 0, tile_2, outputs_2, TILES)
        x_scale_2, x_sum_2 = tl.load(XSCALE + start_2), tl.load(XSUM + start_2)
        if tile * 16 < outputs:
            if MANY or COLUMNS:
                _planes(
                    words, SLAB, TABLE, at, planes, start, stop, member, tile, limit, outputs, WORDS, XSCALE, XSUM,
                    words_stride, scale_stride, OUT, width,
                    KB, TILES, WARPS, MEMBERS, COLUMNS, MANY, LONGEST,
                )  # fmt: skip
            else:
                _plane(
                    words, SLAB, TABLE, at, 0, start, stop, tile, limit, outputs, WORDS, XSCALE, XSUM, x_scale, x_sum,
                    OUT, width, scale, KB, TILES, WARPS, MANY, LONGEST,
                )  # fmt: skip
        else:
            n = tile * 16 + tl.arange(0, TILES * 16)
            for row in range(start, stop):
                tl.store(OUT + row * width + n, tl.zeros_like(n).to(tl.float32), mask=n < limit)
        at, start, stop, member, words, scale = at_2, start_2, stop_2, member_2, words_2, scale_2
        tile, limit, outputs, planes, x_scale, x_sum = tile_2, limit_2, outputs_2, planes_2, x_scale_2, x_sum_2
    if PDL:
        gdc_launch_dependents()  # not before: see `launches`


@triton.jit
def prefetch(at, size):
    """Bring `size` bytes (a multiple of 16) from each of the pointers to the second-level cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2;\nmov.u32 $0, 0;", "=r,l,r", [at.to(tl.int64), size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _prefetch_signs(words, tile, tiles, KB: tl.constexpr, TILES: tl.constexpr):
    """An item's signs of one plane: KB fragments of 512 bytes a tile. Those beyond the last repeat it."""
    EACH: tl.constexpr = tl.constexpr(16)
    t = tl.minimum(tile + tl.arange(0, TILES * EACH) // EACH, tiles - 1).to(tl.int64)
    fragment = tl.arange(0, TILES * EACH) % EACH
    for first in tl.static_range(0, KB, EACH):
        where = t * KB + tl.minimum(first + fragment, KB - 1)
        prefetch(words + where * 128, tl.zeros_like(fragment) + 512)


@triton.jit
def sign_kernel(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, base_outputs, width,
    blocks, M1, M2,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr, LONGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [programs]."""
    sign_items(
        SLAB, TABLE, table_stride, SEGMENTS, tl.program_id(0), tl.num_programs(0), blocks, WORDS, XSCALE, XSUM,
        words_stride, scale_stride, OUT, base_outputs, width, M1, M2,
        KB, TILES, WARPS, MEMBERS, COLUMNS, MANY, LONGEST, PDL,
    )  # fmt: skip
