"""The signs' part of `gluon_ring`: items of TILES tiles of one variant, its only row as planes in registers."""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from kernels.delta_linear import triton_signs
from kernels.delta_linear.gluon_parts import ARRIVALS, await_room, copy, piece, segment, slot_of
from kernels.delta_linear.triton_parts import COL, SCALE, SIGN, has, part
from kernels.delta_linear.triton_share import range_of

PLACES = gl.constexpr(6)
"""Of the ring, an even number. 16 KB each"""
WINDOW, FIRST_WINDOW = gl.constexpr(3), gl.constexpr(1)
"""How many are under way at a time (`await_room`)"""
_MMA, _OPERANDS = triton_signs.MMA, triton_signs.OPERANDS


@gluon.jit
def _produce_item(
    words, this, end, items, full, empty, place,
    KB: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """Tiles this .. this + TILES, as far as end, to two places."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    STEPS: gl.constexpr = (KB + SPREAD - 1) // SPREAD
    e = gl.arange(0, SPREAD * 128, gl.SliceLayout(0, layout))[None, :]
    t = gl.arange(0, TILES, gl.SliceLayout(1, layout))[:, None]
    words_at = words + (this + t).to(gl.int64) * (KB * 128) + e
    for half in gl.static_range(2):
        slot = await_room(full, empty, place, PLACES, FIRST_WINDOW, WINDOW)
        for s in gl.static_range(half * 8, min(half * 8 + 8, STEPS)):
            mask = this + t < end
            if (s + 1) * SPREAD > KB:
                mask = mask & (e < (KB - s * SPREAD) * 128)
            copy(items.index(slot // 2 * 16 + s), words_at + s * SPREAD * 128, mask)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        mbarrier.arrive(full.index(slot), count=ARRIVALS - 32)
        place += 1
    return place


@gluon.jit
def produce_signs(
    SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, place, program, base_outputs, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr, MEMBERS: gl.constexpr,
):  # fmt: skip
    """The program's share of all segments' tiles; returns the next place."""
    tiles = (width + 15) // 16
    lo, hi = range_of(program, PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, _, outputs = segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        tile, end = gl.maximum(lo - g * tiles, 0), gl.minimum(gl.minimum(hi - g * tiles, tiles), (outputs + 15) // 16)
        words = part(SLAB, TABLE, at, SIGN, gl.int32)
        for member in range(MEMBERS):
            first, last = piece(member, tile, end, M1, M2, tiles, MEMBERS)
            for this in range(first, last, TILES):
                place = _produce_item(words, this, last, items, full, empty, place, KB, TILES, SPREAD)
    return place


@gluon.jit
def _sums(of_words, TILES: gl.constexpr, SPREAD: gl.constexpr):
    """Over the words of an output: [TILES, 8, 2], outputs g and g + 8."""
    lanes = gl.sum(gl.reshape(of_words, (TILES, SPREAD, 8, 4, 2, 2)), 5)
    return gl.sum(gl.sum(lanes, 3), 1)


@gluon.jit
def _load_planes(PLANE_WORDS, row, e, zeros, KB: gl.constexpr, SPREAD: gl.constexpr):
    planes = ()
    for s in gl.static_range((KB + SPREAD - 1) // SPREAD):
        at = PLANE_WORDS + row * (KB * 128) + s * SPREAD * 128 + e + zeros
        planes = planes + (gl.load(at, mask=e < (KB - s * SPREAD) * 128, other=0),)
    return planes


@gluon.jit
def _within(e, t, zeros, TILES: gl.constexpr, SPREAD: gl.constexpr):
    """Outputs of an item, in the shape and layout of `_sums`."""
    of_words = gl.where((e % 2 + e // 4 % 4 == 0) & (e < 128), t * 16 + e // 16 % 8 + e // 2 % 2 * 8 + zeros, 0)
    return _sums(of_words, TILES, SPREAD)


@gluon.jit
def _consume_item(
    planes, x_scale, x_sum, SCALES, to, items, full, empty, place, n, outputs, stop, e, zeros,
    KB: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """(2 sums - x_sum) scale[row] scale[n] of an item, 0 from `outputs` on, as far as stop."""
    STEPS: gl.constexpr = (KB + SPREAD - 1) // SPREAD
    CHAINS: gl.constexpr = 4 if STEPS >= 4 else 1
    scale = gl.load(SCALES + n, mask=(n < outputs) & (n < stop), other=0.0)
    low, high = (), ()
    for _ in gl.static_range(CHAINS):
        low, high = low + (zeros,), high + (zeros,)
    slot, phase = slot_of(place, PLACES)
    for s in gl.static_range(16):
        if s % 8 == 0:
            mbarrier.wait(full.index(slot + s // 8), phase)
        if s < STEPS:
            signs = items.index(slot // 2 * 16 + s).load(zeros.type.layout)
            lower, higher = gl.inline_asm_elementwise(
                _MMA, _OPERANDS, [signs, planes[s], low[0], high[0]], dtype=(gl.int32, gl.int32), is_pure=False, pack=4
            )
            low, high = low[1:] + (lower,), high[1:] + (higher,)
    mbarrier.arrive(empty.index(slot), count=1)
    mbarrier.arrive(empty.index(slot + 1), count=1)
    for i in gl.static_range(1, CHAINS):
        low, high = (low[0] + low[i],) + low[1:], (high[0] + high[i],) + high[1:]
    column = e // 4 % 4 * 2 + e % 2 + zeros
    weight = (zeros + 1) << column
    found = _sums(low[0] * weight + high[0] * gl.where(column == 7, -32768, weight * 256), TILES, SPREAD)
    y = (2 * found - x_sum).to(gl.float32) * (x_scale * scale)
    gl.store(to + n, gl.where(n < outputs, y, 0.0), mask=n < stop)


@gluon.jit
def consume_signs(
    SLAB, TABLE, table_stride, SEGMENTS, PLANE_WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, items, full, empty,
    place, program, base_outputs, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr, MEMBERS: gl.constexpr,
):  # fmt: skip
    """As `triton_share.sign_share`, with segments of one row and one plane; returns the next place."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [TILES, SPREAD], [1, 0])
    e = gl.arange(0, SPREAD * 128, gl.SliceLayout(0, layout))[None, :]
    t = gl.arange(0, TILES, gl.SliceLayout(1, layout))[:, None]
    zeros = gl.zeros([TILES, SPREAD * 128], gl.int32, layout)
    within, tiles = _within(e, t, zeros, TILES, SPREAD), (width + 15) // 16
    lo, hi = range_of(program, PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, row, outputs = segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        tile, end = gl.maximum(lo - g * tiles, 0), gl.minimum(hi - g * tiles, tiles)
        signed, SCALES = (outputs + 15) // 16, part(SLAB, TABLE, at, SCALE, gl.float32)
        to = OUT + row.to(gl.int64) * width
        for member in range(MEMBERS):
            first, last = piece(member, tile, gl.minimum(end, signed), M1, M2, tiles, MEMBERS)
            if first < last:
                columns = member * 0
                if MEMBERS > 1:
                    columns = gl.where(has(TABLE, at, COL), member, 0)
                planes = _load_planes(PLANE_WORDS + columns * words_stride, row, e, zeros, KB, SPREAD)
                x_at = columns * scale_stride + row
                x_scale, x_sum = gl.load(XSCALE + x_at), gl.load(XSUM + x_at)
                for this in range(first, last, TILES):
                    _consume_item(
                        planes, x_scale, x_sum, SCALES, to, items, full, empty, place, this * 16 + within, outputs,
                        gl.minimum(width, last * 16), e, zeros, KB, TILES, SPREAD,
                    )  # fmt: skip
                    place += 2
        for this in range(gl.maximum(tile, signed), end, TILES):
            n = this * 16 + within
            gl.store(to + n, gl.zeros_like(n).to(gl.float32), mask=n < gl.minimum(width, end * 16))
    return place
