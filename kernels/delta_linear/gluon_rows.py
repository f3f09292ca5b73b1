"""A decode-sized linear on Hopper where a variant has several rows.

As for one row (`triton_signs`), `mma.m16n8k256 and.popc` multiplies 16 outputs x 256 signs, as they lie in memory, with
8 columns of bits. Here these are one plane of 8 rows: 16 products multiply a block with all that 8 rows have, and
nothing is unpacked. Every plane has sums of its own, 64 registers. A warp has a few blocks of columns, whose planes it
keeps, 32 registers each, and goes over tiles; it weighs its sums once a tile, and once in several tiles the warps that
share them add up theirs in shared memory. A row of signs longer than eight warps' planes is done in parts; sums of all
but the last lie in OUT, as integers.

Signs are products by eight warps, which keep the cores busy; the base is reading above all. So four more warps multiply
the base's tiles at the same time (`gluon_ring_base`), both from rings that other warps fill, as in `gluon_ring`. There
is one such program on a multiprocessor.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import launches
from kernels.delta_linear import triton_parts, triton_signs
from kernels.delta_linear.gluon_parts import ARRIVALS, UNDERSCORE, copy, piece, segment
from kernels.delta_linear.gluon_ring_base import consume_base, produce_base, produce_rows
from kernels.delta_linear.triton_parts import COL, SCALE, SIGN, has, part
from kernels.delta_linear.triton_share import range_of
from kernels.device import DeviceDeltas, Kinds, Partials, Target

WARPS = 8
MOST_ROWS = 64
"""Of the base"""
_STEPS = {True: 3, False: 4}
"""With the base or without: blocks of 256 columns of which a warp keeps the planes"""
_GROUP, _GROUP_OF_MANY = 4, 2
"""Places of signs to an item, at most, and where four would take more registers than the base leaves"""
_SHARED_BYTES = 218 * 1024
"""Leaves room for a program of the norm, see `gluon_ring`"""
_AHEAD = gl.constexpr(4)
"""Places of x"""
_WINDOW, _FIRST_WINDOW = gl.constexpr(6), gl.constexpr(2)
"""Places of signs under way at a time: see `gluon_parts.await_room`"""
_REGISTERS = {True: 128, False: 168}
"""Of a thread at launch; those that multiply signs take what all others leave"""
_MMA, _OPERANDS = triton_signs.MMA, triton_signs.OPERANDS


@gluon.jit
def _await_room(full, empty, group, i, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """Wait until the i-th place of the group is free, and few are under way. Returns where it is."""
    WINDOW: gl.constexpr = _WINDOW if _WINDOW < GROUP * GROUPS else GROUP * GROUPS - 1
    if i == 0:
        mbarrier.wait(empty.index(group % GROUPS), group // GROUPS & 1 ^ 1)
    place = group * GROUP + i
    window = gl.where(group < GROUPS, _FIRST_WINDOW, WINDOW)
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
    found = zeros
    for p in gl.static_range(8):
        found += low[p] * (1 << p) + high[p] * (256 << p if p < 7 else -32768)
    return found


@gluon.jit
def _store(sums, of_places, GROUP: gl.constexpr):
    """All at once: between stores one by one the compiler has warps wait for each other."""
    if GROUP == 4:
        sums.store(gl.join(gl.join(of_places[0], of_places[1]), gl.join(of_places[2], of_places[3])))
    elif GROUP == 2:
        sums.store(gl.join(of_places[0], of_places[1]))
    else:
        sums.store(of_places[0])


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
                        of_places = ()
                        for i in gl.static_range(GROUP):
                            slot = group % GROUPS * GROUP + i
                            mbarrier.wait(full.index(slot), group // GROUPS & 1)
                            of_places = of_places + (_sums(planes, items, slot, zeros, STEPS),)
                        _store(sums, of_places, GROUP)
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
def _produce_base(w_desc, tiles, full, empty, width, SHARING: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr):
    program = gl.program_id(0)
    if program < SHARING:
        produce_base(w_desc, tiles, full, empty, program * 0, program, width, SHARING, K, PLACES, 2, PLACES - 1)


@gluon.jit
def _consume_base(
    BASE, tiles, x_tiles, full, empty, x_full, x_empty, T, width,
    SHARING: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr, BT: gl.constexpr, PLACES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    if PDL:
        gdc_wait()
    if program < SHARING:
        consume_base(
            BASE, tiles, x_tiles, full, empty, x_full, x_empty, program * 0, program, T, width, SHARING, K, SPLIT, BT,
            _AHEAD, PLACES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["T"])
def rows_kernel(
    x_desc, w_desc, BASE, SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT,
    T, N, width, M1, M2,
    PROGRAMS: gl.constexpr, SHARING: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr, BT: gl.constexpr,
    PARTS: gl.constexpr, STEPS: gl.constexpr, SPREAD: gl.constexpr, TILES: gl.constexpr, GROUP: gl.constexpr,
    GROUPS: gl.constexpr, PLACES: gl.constexpr, MEMBERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid [PROGRAMS]; arguments as `gluon_ring.ring_kernel`'s. PARTS of STEPS times SPREAD blocks of columns, TILES
    tiles to a place of the ring and GROUP places to an item."""
    if PDL:
        gdc_launch_dependents()
    KB: gl.constexpr = (K + 255) // 256
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    items = gl.allocate_shared_memory(gl.int32, [GROUPS * GROUP * STEPS, TILES, SPREAD * 128], plain)
    if GROUP == 4:
        sums = gl.allocate_shared_memory(
            gl.int32, [TILES, SPREAD * 128, 2, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0, 2, 3])
        )
    elif GROUP == 2:
        sums = gl.allocate_shared_memory(
            gl.int32, [TILES, SPREAD * 128, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0, 2])
        )
    else:
        sums = gl.allocate_shared_memory(gl.int32, [TILES, SPREAD * 128], plain)
    full = gl.allocate_shared_memory(gl.int64, [GROUPS * GROUP, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS * GROUP):
        mbarrier.init(full.index(i), count=ARRIVALS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(empty.index(i), count=1)
    if SHARING == 0:  # arguments are written out twice: what a variable holds is no constant any more
        gl.warp_specialize(
            [
                (
                    _consume,
                    (SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, items,
                     sums, full, empty, N, width, M1, M2, PROGRAMS, KB, PARTS, STEPS, SPREAD, TILES, GROUP, GROUPS,
                     MEMBERS, PDL),
                ),
                (
                    _produce,
                    (SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, N, width, M1, M2, PROGRAMS, KB, PARTS,
                     STEPS, SPREAD, TILES, GROUP, GROUPS, MEMBERS),
                ),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        tiles = gl.allocate_shared_memory(w_desc.dtype, [2 * PLACES, 64, 64], w_desc.layout)
        x_tiles = gl.allocate_shared_memory(x_desc.dtype, [_AHEAD, BT, 64], x_desc.layout)
        w_full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
        w_empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
        x_full = gl.allocate_shared_memory(gl.int64, [_AHEAD, 1], mbarrier.MBarrierLayout())
        x_empty = gl.allocate_shared_memory(gl.int64, [_AHEAD, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(PLACES):
            mbarrier.init(w_full.index(i), count=ARRIVALS)
            mbarrier.init(w_empty.index(i), count=1)
        for i in gl.static_range(_AHEAD):
            mbarrier.init(x_full.index(i), count=1)
            mbarrier.init(x_empty.index(i), count=1)
        gl.warp_specialize(
            [
                (
                    _consume,
                    (SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, items,
                     sums, full, empty, N, width, M1, M2, PROGRAMS, KB, PARTS, STEPS, SPREAD, TILES, GROUP, GROUPS,
                     MEMBERS, PDL),
                ),
                (
                    _consume_base,
                    (BASE, tiles, x_tiles, w_full, w_empty, x_full, x_empty, T, width, SHARING, K, SPLIT, BT, PLACES,
                     PDL),
                ),
                (
                    _produce,
                    (SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, N, width, M1, M2, PROGRAMS, KB, PARTS,
                     STEPS, SPREAD, TILES, GROUP, GROUPS, MEMBERS),
                ),
                (_produce_base, (w_desc, tiles, w_full, w_empty, width, SHARING, K, PLACES)),
                (produce_rows, (x_desc, x_tiles, x_full, x_empty, width, SHARING, K, _AHEAD, PDL)),
            ],
            [4, 1, 1, 1],
            [80, 32, 24, 24],
        )  # fmt: skip


def several_rows(
    x_TK: torch.Tensor, planes: list[torch.Tensor | int | None], weight_NK: torch.Tensor, target: Target,
    deltas: DeviceDeltas, segments_G4: torch.Tensor, kinds: Kinds, out: Partials, first_tiles: tuple[int, int], *,
    programs: int, sharing: int,
) -> None:  # fmt: skip
    """As `gluon_ring.ring`, with segments of up to SEGMENT_ROWS rows; one program to a multiprocessor."""
    rows, blocks, width = x_TK.shape[0], target.tiles[1], out.base_STN.shape[2]
    assert sharing == 0 or rows <= MOST_ROWS, f"{rows} rows of the base"
    base, pdl = sharing > 0, launches.early(x_TK)
    parts = triton.cdiv(blocks, WARPS * _STEPS[base])
    each = triton.cdiv(blocks, parts)
    spread = min(WARPS, triton.next_power_of_2(triton.cdiv(each, _STEPS[base])))
    steps = triton.cdiv(each, spread)
    group = min(_GROUP_OF_MANY if base and (parts > 1 or steps == _STEPS[base]) else _GROUP, spread)
    columns = max(16, triton.next_power_of_2(rows)) if base else 16
    places = 5 if columns <= 32 else 4
    room = _SHARED_BYTES - WARPS * 512 * group - base * (places * 128 + _AHEAD.value * columns) * 128
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TK, [columns, 64], layout),
        TensorDescriptor.from_tensor(weight_NK, [64, 64], layout),
        out.base_STN, *triton_parts.table_arguments(deltas, target), segments_G4, *planes, out.delta_TN,
        rows, target.outputs, width, *first_tiles, PROGRAMS=programs, SHARING=sharing, K=target.inputs,
        SPLIT=out.base_STN.shape[0], BT=columns, PARTS=parts, STEPS=steps, SPREAD=spread, TILES=WARPS // spread,
        GROUP=group, GROUPS=min(8, room // (WARPS * 512 * steps * group)), PLACES=places,
        MEMBERS=len(target.members) if kinds.columns else 1, PDL=pdl, num_warps=WARPS, maxnreg=_REGISTERS[base],
        **launches.options(pdl),
    )  # fmt: skip
