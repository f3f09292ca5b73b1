"""Products of several rows of one variant with a plane of signs, on Hopper's binary tensor core.

As for one row (`triton_signs`), `mma.m16n8k256 and.popc` multiplies 16 outputs x 256 signs, as they lie in memory, with
8 columns of bits. Here these are one plane of 8 rows: 16 products multiply a block with all that 8 rows have, and
nothing is unpacked. Every plane has sums of its own, 64 registers. A warp has up to 4 blocks of columns, whose planes
it keeps, 128 registers, and goes over tiles; it weighs its sums once a tile, and once in several tiles the warps that
share them add up theirs in shared memory.

Eight warps multiply, one copies signs, through a ring as in `gluon_ring`, before the kernel ahead has ended. A row of
signs longer than eight warps' planes is done in parts; sums of all but the last lie in OUT, as integers.

Eight rows take 0.8 us of products of a 7B's qkv, its signs 1.4 us of reading: a row of a variant may be done as eight.
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
from kernels.delta_linear.gluon_parts import ARRIVALS, UNDERSCORE, copy, piece, segment
from kernels.delta_linear.triton_parts import COL, SCALE, SIGN, has, part
from kernels.delta_linear.triton_share import range_of
from kernels.device import DeviceDeltas, Kinds, Partials, Target

WARPS = 8
MOST_STEPS = 4
"""Blocks of 256 columns of which a warp keeps the planes"""
_RING_BYTES = 192 * 1024
WINDOW, FIRST_WINDOW = gl.constexpr(6), gl.constexpr(2)
"""Places under way at a time: see `gluon_parts`. Each is up to 16 KB, and a multiprocessor has one program"""
_REGISTERS = 168
"""Of a thread at launch; those that multiply take what the one that copies leaves"""
_MMA, _OPERANDS = triton_signs.MMA, triton_signs.OPERANDS


@gluon.jit
def _await_room(full, empty, group, i, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """Wait until the i-th place of the group is free, and few are under way. Returns where it is."""
    if i == 0:
        mbarrier.wait(empty.index(group % GROUPS), group // GROUPS & 1 ^ 1)
    place = group * GROUP + i
    window = gl.where(group < GROUPS, FIRST_WINDOW, WINDOW)
    before = gl.maximum(place - window, 0)
    mbarrier.wait(full.index(before % (GROUP * GROUPS)), before // (GROUP * GROUPS) & 1, pred=place >= window)
    return place % (GROUP * GROUPS)


@gluon.jit
def _produce(
    SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, base_outputs, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, PARTS: gl.constexpr, STEPS: gl.constexpr, SPREAD: gl.constexpr,
    TILES: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, MEMBERS: gl.constexpr,
):  # fmt: skip
    """Signs, TILES tiles of a part's columns to a place, GROUP places to an item."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    e = gl.arange(0, SPREAD * 128, gl.SliceLayout(0, layout))[None, :]
    t = gl.arange(0, TILES, gl.SliceLayout(1, layout))[:, None]
    tiles = (width + 15) // 16
    lo, hi = range_of(gl.program_id(0), PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    group = lo * 0
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, _, outputs = segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        tile, end = gl.maximum(lo - g * tiles, 0), gl.minimum(gl.minimum(hi - g * tiles, tiles), (outputs + 15) // 16)
        words = part(SLAB, TABLE, at, SIGN, gl.int32) + e
        for member in range(MEMBERS):
            first, last = piece(member, tile, end, M1, M2, tiles, MEMBERS)
            for one in range(PARTS):
                for this in range(first, last, GROUP * TILES):
                    for i in range(GROUP):
                        slot, from_tile = _await_room(full, empty, group, i, GROUP, GROUPS), this + i * TILES + t
                        words_at = words + from_tile.to(gl.int64) * (KB * 128)
                        for s in gl.static_range(STEPS):
                            block = (one * STEPS + s) * SPREAD
                            mask = (from_tile < last) & (e < (KB - block) * 128)
                            copy(items.index(slot * STEPS + s), words_at + block * 128, mask)
                        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                        mbarrier.arrive(full.index(slot), count=ARRIVALS - 32)
                    group += 1


@gluon.jit
def _load_planes(WORDS, row, e, zeros, one, KB: gl.constexpr, STEPS: gl.constexpr, SPREAD: gl.constexpr):
    """Of a part's columns: for each step and p < 8 the words of planes p and p + 8, zero beyond the last block."""
    planes = ()
    for s in gl.static_range(STEPS):
        block = (one * STEPS + s) * SPREAD
        at = WORDS + row * (KB * 128) + block * 128 + e // 128 * 128 + e % 16 + zeros
        for p in gl.static_range(8):
            planes = planes + (gl.load(at + p * 16, mask=e < (KB - block) * 128, other=0),)
    return planes


@gluon.jit
def _sums(planes, items, slot, zeros, STEPS: gl.constexpr):
    """sum_k b[n, k] q[row, k] of a place, over the columns that the warp has."""
    layout: gl.constexpr = zeros.type.layout
    low, high = (), ()
    for _ in gl.static_range(8):
        low, high = low + (zeros,), high + (zeros,)
    for s in gl.static_range(STEPS):
        signs = items.index(slot * STEPS + s).load(layout)
        for p in gl.static_range(8):
            lower, higher = gl.inline_asm_elementwise(
                _MMA, _OPERANDS, [signs, planes[s * 8 + p], low[0], high[0]], dtype=(gl.int32, gl.int32),
                is_pure=False, pack=4,
            )  # fmt: skip
            low, high = low[1:] + (lower,), high[1:] + (higher,)
    found = low[0]
    for p in gl.static_range(1, 8):
        found += low[p] * (1 << p)
    for p in gl.static_range(8):
        found += high[p] * (256 << p if p < 7 else -32768)
    return found


@gluon.jit
def _consume(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, items, sums, full, empty,
    base_outputs, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, PARTS: gl.constexpr, STEPS: gl.constexpr, SPREAD: gl.constexpr,
    TILES: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, MEMBERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [TILES, SPREAD], [1, 0])
    shares: gl.constexpr = gl.BlockedLayout([1, SPREAD, 4], [1, 1, 32], [8, 1, 1], [2, 1, 0])
    whole: gl.constexpr = gl.SliceLayout(1, shares)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    if UNDERSCORE:
        of_shares = sums._reinterpret(gl.int32, [GROUP * TILES, SPREAD, 128], plain)
    else:
        of_shares = sums.reinterpret(gl.int32, [GROUP * TILES, SPREAD, 128], plain)
    e = gl.arange(0, SPREAD * 128, gl.SliceLayout(0, layout))[None, :]
    zeros = gl.zeros([TILES, SPREAD * 128], gl.int32, layout)
    word = gl.arange(0, 128, gl.SliceLayout(0, whole))[None, :]
    t = gl.arange(0, GROUP * TILES, gl.SliceLayout(1, whole))[:, None]
    row_of, within = word // 4 % 4 * 2 + word % 2, t * 16 + word // 16 + word // 2 % 2 * 8
    if PDL:
        gdc_wait()
    tiles = (width + 15) // 16
    lo, hi = range_of(gl.program_id(0), PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    group = lo * 0
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, start, outputs = segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        stop = gl.load(SEGMENTS + g * 4 + 2)
        row, signed, SCALES = start + row_of, (outputs + 15) // 16, part(SLAB, TABLE, at, SCALE, gl.float32)
        tile, end = gl.maximum(lo - g * tiles, 0), gl.minimum(hi - g * tiles, tiles)
        to = OUT + row.to(gl.int64) * width
        integers = to.to(gl.pointer_type(gl.int32), bitcast=True)
        for member in range(MEMBERS):
            first, last = piece(member, tile, gl.minimum(end, signed), M1, M2, tiles, MEMBERS)
            if first < last:
                columns = member * 0
                if MEMBERS > 1:
                    columns = gl.where(has(TABLE, at, COL), member, 0)
                x_at = columns * scale_stride + gl.minimum(row, stop - 1)
                x_scale, x_sum = gl.load(XSCALE + x_at), gl.load(XSUM + x_at)
                WORDS_of = WORDS + columns * words_stride
                for one in range(PARTS):
                    planes = _load_planes(
                        WORDS_of, gl.minimum(start + e // 16 % 8, stop - 1), e, zeros, one, KB, STEPS, SPREAD
                    )
                    for this in range(first, last, GROUP * TILES):
                        n = this * 16 + within
                        mask = (row < stop) & (n < gl.minimum(width, last * 16))
                        scale = gl.load(SCALES + n, mask=mask & (n < outputs), other=0.0)
                        for i in range(gl.minimum(GROUP, (last - this + TILES - 1) // TILES)):
                            slot = group % GROUPS * GROUP + i
                            mbarrier.wait(full.index(slot), group // GROUPS & 1)
                            sums.index(i).store(_sums(planes, items, slot, zeros, STEPS))
                        mbarrier.arrive(empty.index(group % GROUPS), count=1)
                        group += 1
                        found = gl.sum(of_shares.load(shares), 1)
                        if PARTS > 1:
                            found += gl.load(integers + n, mask=mask & (one > 0), other=0)
                            gl.store(integers + n, found, mask=mask & (one < PARTS - 1))
                        y = (2 * found - x_sum).to(gl.float32) * (x_scale * scale)
                        gl.store(to + n, gl.where(n < outputs, y, 0.0), mask=mask & (one == PARTS - 1))
        for this in range(gl.maximum(tile, signed), end, GROUP * TILES):
            n = this * 16 + within
            mask = (row < stop) & (n < gl.minimum(width, end * 16))
            gl.store(to + n, gl.zeros_like(n).to(gl.float32), mask=mask)


@gluon.jit
def rows_kernel(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, N, width, M1, M2,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, PARTS: gl.constexpr, STEPS: gl.constexpr, SPREAD: gl.constexpr,
    TILES: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, MEMBERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid [PROGRAMS]; arguments as `sign_kernel`'s. PARTS of STEPS times SPREAD blocks of columns."""
    if PDL:
        gdc_launch_dependents()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    items = gl.allocate_shared_memory(gl.int32, [GROUPS * GROUP * STEPS, TILES, SPREAD * 128], plain)
    sums = gl.allocate_shared_memory(gl.int32, [GROUP, TILES, SPREAD * 128], plain)
    full = gl.allocate_shared_memory(gl.int64, [GROUPS * GROUP, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS * GROUP):
        mbarrier.init(full.index(i), count=ARRIVALS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _consume,
                (SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, items, sums,
                 full, empty, N, width, M1, M2, PROGRAMS, KB, PARTS, STEPS, SPREAD, TILES, GROUP, GROUPS, MEMBERS, PDL),
            ),
            (
                _produce,
                (SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, N, width, M1, M2, PROGRAMS, KB, PARTS, STEPS,
                 SPREAD, TILES, GROUP, GROUPS, MEMBERS),
            ),
        ],
        [1],
        [40],
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
    parts = triton.cdiv(blocks, WARPS * MOST_STEPS)
    each = triton.cdiv(blocks, parts)
    spread = min(WARPS, triton.next_power_of_2(triton.cdiv(each, MOST_STEPS)))
    steps, group = triton.cdiv(each, spread), min(4, spread)
    rows_kernel[(programs,)](
        *triton_parts.table_arguments(deltas, target), segments_G4, *planes, out.delta_TN, target.outputs, width,
        *first_tiles, PROGRAMS=programs, KB=blocks, PARTS=parts, STEPS=steps, SPREAD=spread, TILES=WARPS // spread,
        GROUP=group, GROUPS=_RING_BYTES // (WARPS * 512 * steps * group),
        MEMBERS=len(target.members) if kinds.columns else 1, PDL=pdl, num_warps=WARPS, maxnreg=_REGISTERS,
        **launches.options(pdl),
    )  # fmt: skip
