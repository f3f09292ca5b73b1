"""Products of several rows of one variant with a plane of signs, on Hopper's binary tensor core.

As for one row (`triton_signs`), `mma.m16n8k256 and.popc` multiplies 16 outputs x 256 signs, as they lie in memory, with
8 columns of bits. Here these are one plane of 8 rows, so that 16 products multiply a block with all that 8 rows have,
and nothing has to be unpacked. Every plane has sums of its own: they are weighed once for a whole row of signs, in the
thread in which they are. So a program's warps have tiles of their own, two each, and the planes of a segment's rows are
in shared memory, in the order in which lanes take them.

Eight warps multiply. One copies signs, through a ring as in `gluon_ring` and before the kernel ahead has ended, one the
planes of a segment's rows, when that has ended. A row of signs longer than the planes that there is room for is done in
parts; sums of all but the last lie in OUT, as integers.

Eight rows take 1.2 us of a 7B's qkv, its signs 1.4 us of reading, so that one row of a variant may be done as eight.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import launches
from kernels.delta_linear import triton_parts, triton_signs
from kernels.delta_linear.gluon_parts import ARRIVALS, copy, piece, segment
from kernels.delta_linear.triton_parts import COL, SCALE, SIGN, has, part
from kernels.delta_linear.triton_share import range_of
from kernels.device import DeviceDeltas, Kinds, Partials, Target

TILES = gl.constexpr(16)
"""Of an item: two for each warp"""
BLOCKS = gl.constexpr(4)
"""Of 256 columns of an item, in a place of the ring: 32 KB"""
MOST_BLOCKS = 28
"""Of a part: 4 KB of planes each"""
_SHARED_BYTES = 220 * 1024
_REGISTERS = 168
"""Of a thread at launch; those that multiply take what those that copy leave"""
_MMA, _OPERANDS = triton_signs.MMA, triton_signs.OPERANDS


@gluon.jit
def _await_room(full, empty, place, PLACES: gl.constexpr):
    """Wait until the place is free and few are under way (`gluon_parts.WINDOW`): one at first, later three."""
    slot = place % PLACES
    mbarrier.wait(empty.index(slot), place // PLACES & 1 ^ 1)
    window = gl.where(place < PLACES, 1, PLACES - 1)
    before = gl.maximum(place - window, 0)
    mbarrier.wait(full.index(before % PLACES), before // PLACES & 1, pred=place >= window)
    return slot


@gluon.jit
def _produce_signs(
    SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, base_outputs, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, PARTS: gl.constexpr, MEMBERS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    STEPS: gl.constexpr = (KB + BLOCKS - 1) // BLOCKS
    EACH: gl.constexpr = (STEPS + PARTS - 1) // PARTS
    e = gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :]
    t = gl.arange(0, 4, gl.SliceLayout(1, layout))[:, None]
    tiles = (width + 15) // 16
    lo, hi = range_of(gl.program_id(0), PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    place = lo * 0
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, _, outputs = segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        tile, end = gl.maximum(lo - g * tiles, 0), gl.minimum(gl.minimum(hi - g * tiles, tiles), (outputs + 15) // 16)
        words = part(SLAB, TABLE, at, SIGN, gl.int32) + e
        for member in range(MEMBERS):
            first, last = piece(member, tile, end, M1, M2, tiles, MEMBERS)
            for one in range(PARTS):
                for this in range(first, last, TILES):
                    for step in range(one * EACH, gl.minimum(one * EACH + EACH, STEPS)):
                        slot = _await_room(full, empty, place, PLACES)
                        for b in gl.static_range(BLOCKS):
                            block = step * BLOCKS + b
                            for i in gl.static_range(4):
                                one_tile = this + i * 4 + t
                                from_ = words + one_tile.to(gl.int64) * (KB * 128) + block * 128
                                to = items.index(slot * BLOCKS + b).slice(i * 4, 4, dim=0)
                                copy(to, from_, (one_tile < last) & (block < KB))
                        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                        mbarrier.arrive(full.index(slot), count=ARRIVALS - 32)
                        place += 1


@gluon.jit
def _copy_planes(planes, row_at, one, KB: gl.constexpr, EACH: gl.constexpr):
    """Of a part's blocks, [8 rows, 16 words] of planes p and p + 8; zero beyond the last."""
    layout: gl.constexpr = row_at.type.layout
    for b in range(EACH * BLOCKS):
        block = one * EACH * BLOCKS + b
        if block < KB:
            for p in gl.static_range(8):
                copy(planes.index(b * 8 + p), row_at + block * 128 + p * 16)
        else:
            zeros = gl.zeros([8, 16], gl.int32, layout)
            for p in gl.static_range(8):
                planes.index(b * 8 + p).store(zeros)


@gluon.jit
def _produce_planes(
    TABLE, table_stride, SEGMENTS, WORDS, words_stride, planes, full, empty, base_outputs, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, PARTS: gl.constexpr, MEMBERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0])
    EACH: gl.constexpr = ((KB + BLOCKS - 1) // BLOCKS + PARTS - 1) // PARTS
    row = gl.arange(0, 8, gl.SliceLayout(1, layout))[:, None]
    word = gl.arange(0, 16, gl.SliceLayout(0, layout))[None, :]
    if PDL:
        gdc_wait()
    tiles = (width + 15) // 16
    lo, hi = range_of(gl.program_id(0), PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    turn = lo * 0
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, start, outputs = segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        stop = gl.load(SEGMENTS + g * 4 + 2)
        tile, end = gl.maximum(lo - g * tiles, 0), gl.minimum(gl.minimum(hi - g * tiles, tiles), (outputs + 15) // 16)
        for member in range(MEMBERS):
            first, last = piece(member, tile, end, M1, M2, tiles, MEMBERS)
            if first < last:
                columns = member * 0
                if MEMBERS > 1:
                    columns = gl.where(has(TABLE, at, COL), member, 0)
                row_at = WORDS + columns * words_stride + gl.minimum(start + row, stop - 1) * (KB * 128) + word
                for one in range(PARTS):
                    mbarrier.wait(empty, turn & 1 ^ 1)
                    _copy_planes(planes, row_at, one, KB, EACH)
                    async_copy.mbarrier_arrive(full, increment_count=False)
                    mbarrier.arrive(full, count=ARRIVALS - 32)
                    turn += 1


@gluon.jit
def _sums(planes, items, full, empty, place, steps, zeros, PLACES: gl.constexpr):
    """sum_k b[n, k] q[row, k] of an item's part, as products have it: [16, 128]."""
    layout: gl.constexpr = zeros.type.layout
    columns: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0])
    low, high = (), ()
    for _ in gl.static_range(8):
        low, high = low + (zeros,), high + (zeros,)
    for step in range(steps):
        slot, phase = (place + step) % PLACES, (place + step) // PLACES & 1
        mbarrier.wait(full.index(slot), phase)
        for b in gl.static_range(BLOCKS):
            signs = items.index(slot * BLOCKS + b).load(layout)
            for p in gl.static_range(8):
                words = gl.reshape(planes.index((step * BLOCKS + b) * 8 + p).load(columns), (1, 128))
                lower, higher = gl.inline_asm_elementwise(
                    _MMA, _OPERANDS, [signs, gl.convert_layout(words, layout) + zeros, low[0], high[0]],
                    dtype=(gl.int32, gl.int32), is_pure=False, pack=4,
                )  # fmt: skip
                low, high = low[1:] + (lower,), high[1:] + (higher,)
        mbarrier.arrive(empty.index(slot), count=1)
    found = zeros
    for p in gl.static_range(8):
        found += low[p] * (1 << p) + high[p] * (256 << p if p < 7 else -32768)
    return found


@gluon.jit
def _consume(
    SLAB, TABLE, table_stride, SEGMENTS, XSCALE, XSUM, scale_stride, OUT, planes, items, full, empty, planes_full,
    planes_empty, base_outputs, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, PARTS: gl.constexpr, MEMBERS: gl.constexpr, PLACES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    STEPS: gl.constexpr = (KB + BLOCKS - 1) // BLOCKS
    EACH: gl.constexpr = (STEPS + PARTS - 1) // PARTS
    e = gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :]
    t = gl.arange(0, TILES, gl.SliceLayout(1, layout))[:, None]
    zeros = gl.zeros([TILES, 128], gl.int32, layout)
    row_of, within = e // 4 % 4 * 2 + e % 2, t * 16 + e // 16 + e // 2 % 2 * 8
    if PDL:
        gdc_wait()
    tiles = (width + 15) // 16
    lo, hi = range_of(gl.program_id(0), PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    place, turn = lo * 0, lo * 0
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, start, outputs = segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        row, stop = start + row_of, gl.load(SEGMENTS + g * 4 + 2)
        there = gl.minimum(row, stop - 1)
        tile, end = gl.maximum(lo - g * tiles, 0), gl.minimum(hi - g * tiles, tiles)
        signed, SCALES = (outputs + 15) // 16, part(SLAB, TABLE, at, SCALE, gl.float32)
        to = OUT + row.to(gl.int64) * width
        integers = to.to(gl.pointer_type(gl.int32), bitcast=True)
        for member in range(MEMBERS):
            first, last = piece(member, tile, gl.minimum(end, signed), M1, M2, tiles, MEMBERS)
            if first < last:
                columns = member * 0
                if MEMBERS > 1:
                    columns = gl.where(has(TABLE, at, COL), member, 0)
                x_scale = gl.load(XSCALE + columns * scale_stride + there)
                x_sum = gl.load(XSUM + columns * scale_stride + there)
                for one in range(PARTS):
                    steps = gl.minimum(EACH, STEPS - one * EACH)
                    mbarrier.wait(planes_full, turn & 1)
                    for this in range(first, last, TILES):
                        n = this * 16 + within
                        mask = (row < stop) & (n < gl.minimum(width, last * 16))
                        found = _sums(planes, items, full, empty, place, steps, zeros, PLACES)
                        place += steps
                        if PARTS > 1:
                            found += gl.load(integers + n, mask=mask & (one > 0), other=0)
                            gl.store(integers + n, found, mask=mask & (one < PARTS - 1))
                        scale = gl.load(SCALES + n, mask=mask & (n < outputs), other=0.0)
                        y = (2 * found - x_sum).to(gl.float32) * (x_scale * scale)
                        gl.store(to + n, gl.where(n < outputs, y, 0.0), mask=mask & (one == PARTS - 1))
                    mbarrier.arrive(planes_empty, count=1)
                    turn += 1
        for this in range(gl.maximum(tile, signed), end, TILES):
            n = this * 16 + within
            mask = (row < stop) & (n < gl.minimum(width, end * 16))
            gl.store(to + n, gl.zeros_like(n).to(gl.float32), mask=mask)


@gluon.jit
def rows_kernel(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, N, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, PARTS: gl.constexpr, MEMBERS: gl.constexpr, PLACES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Grid [PROGRAMS]; arguments as `sign_kernel`'s."""
    if PDL:
        gdc_launch_dependents()
    EACH: gl.constexpr = ((KB + BLOCKS - 1) // BLOCKS + PARTS - 1) // PARTS
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    items = gl.allocate_shared_memory(gl.int32, [PLACES * BLOCKS, TILES, 128], plain)
    planes = gl.allocate_shared_memory(gl.int32, [EACH * BLOCKS * 8, 8, 16], plain)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    planes_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    planes_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(planes_full, count=ARRIVALS)
    mbarrier.init(planes_empty, count=1)
    gl.warp_specialize(
        [
            (
                _consume,
                (SLAB, TABLE, table_stride, SEGMENTS, XSCALE, XSUM, scale_stride, OUT, planes, items, full, empty,
                 planes_full, planes_empty, N, width, M1, M2, PROGRAMS, KB, PARTS, MEMBERS, PLACES, PDL),
            ),
            (
                _produce_signs,
                (SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, N, width, M1, M2, PROGRAMS, KB, PARTS,
                 MEMBERS, PLACES),
            ),
            (
                _produce_planes,
                (TABLE, table_stride, SEGMENTS, WORDS, words_stride, planes, planes_full, planes_empty, N, width, M1,
                 M2, PROGRAMS, KB, PARTS, MEMBERS, PDL),
            ),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip


def several_rows(
    planes: list[torch.Tensor | int | None], target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor,
    kinds: Kinds, out: Partials, first_tiles: tuple[int, int], *, programs: int,
) -> None:  # fmt: skip
    """Signs' products with segments of up to SEGMENT_ROWS rows, in `delta_TN`.

    Args:
        planes: `device.plane_arguments`. first_tiles: of the second and third member, `device.member_tiles`.
    """
    assert out.delta_TN is not None
    blocks, width, pdl = target.tiles[1], out.delta_TN.shape[1], launches.early(out.delta_TN)
    parts = triton.cdiv(blocks, MOST_BLOCKS)
    room = _SHARED_BYTES - triton.cdiv(triton.cdiv(blocks, BLOCKS.value), parts) * BLOCKS.value * 4096
    rows_kernel[(programs,)](
        *triton_parts.table_arguments(deltas, target), segments_G4, *planes, out.delta_TN, target.outputs, width,
        *first_tiles, PROGRAMS=programs, KB=blocks, PARTS=parts, MEMBERS=len(target.members) if kinds.columns else 1,
        PLACES=min(4, room // (BLOCKS.value * TILES.value * 512)), PDL=pdl, num_warps=8, maxnreg=_REGISTERS,
        **launches.options(pdl),
    )  # fmt: skip
