"""A decode-sized linear on Hopper whose weights are under way before its rows are there.

As `triton_flat`, with the same shares and the same results, but other hands. One warp of a program copies its whole
share, base tiles and signs alike, through one ring in shared memory: it waits for nothing but room, neither for the
kernel before (weights do not depend on it) nor between a tile and the next, a segment and the next, or base and signs.
So the memory is busy while norm and attention run. Another warp copies x for base tiles, four warps multiply.

The ring's places hold 16 KB each: a step of a base tile (64 outputs x 128 inputs), or half of an item of signs: the
first or last 8 of 16 steps of TILES tiles. Signs come first: planes are there when x is, and take less time to begin.

Not covered: other chips, several planes, column scales, several rows of a variant; K above 16384.
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
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import launches
from kernels.delta_linear import triton_parts, triton_signs
from kernels.device import UNIT, DeviceDeltas, Kinds, Partials, Planes, Target

# Their names differ between versions of Triton.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_UNDERSCORE = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

OUTPUTS, INNER = 64, 128
"""Of a step of the base"""
PLACES, WINDOW = 6, 2
"""Of the ring; how many may be under way. More keep the memory no busier, and who reads beside them waits for them all"""
MAX_INPUTS, MAX_ROWS = 16384, 32
REGISTERS = 96
"""Of a thread at launch; those that multiply take what those that copy leave. Few enough for a norm beside two programs"""
_PLACES = gl.constexpr(PLACES)
_WORDS = gl.constexpr(UNIT // 4)
_FLOATS = _WORDS
_SIGN, _SCALE, _PLANES, _OUTPUTS = triton_parts.SIGN, triton_parts.SCALE, triton_parts.PLANES, triton_parts.OUTPUTS
_MMA, _OPERANDS = triton_signs._MMA, triton_signs._OPERANDS


@gluon.jit
def _range_of(program, programs, total):
    """`triton_share.range_of`."""
    each, more = total // programs, total % programs
    first = program * each + gl.minimum(program, more)
    return first, first + each + (program < more).to(gl.int32)


@gluon.jit
def _program_of(one, programs, total):
    """`triton_share.program_of`."""
    each, more = total // programs, total % programs
    longer = more * (each + 1)
    return gl.where(one < longer, one // (each + 1), more + (one - longer) // each)


@gluon.jit
def _segment(TABLE, table_stride, SEGMENTS, g, base_outputs):
    """(its entry's place in the table, first row, tiles that have signs, outputs that have)."""
    at = gl.load(SEGMENTS + g * 4) * table_stride
    own = gl.load(TABLE + at + _OUTPUTS)
    outputs = gl.where(own > 0, own, base_outputs)
    sign, scale, planes = gl.load(TABLE + at + _SIGN), gl.load(TABLE + at + _SCALE), gl.load(TABLE + at + _PLANES)
    outputs = gl.where((sign >= 0) & (scale >= 0) & (planes > 0), outputs, 0)
    return at, gl.load(SEGMENTS + g * 4 + 1), (outputs + 15) // 16, outputs


@gluon.jit
def _pace(full, place, WINDOW: gl.constexpr):
    """Wait until no more than WINDOW places, this one included, are to be under way."""
    before = gl.maximum(place - WINDOW, 0)
    mbarrier.wait(full.index(before % _PLACES), before // _PLACES & 1, pred=place >= WINDOW)


@gluon.jit
def _produce_base(
    w_desc,
    tiles,
    full,
    empty,
    place,
    program,
    width,
    PROGRAMS: gl.constexpr,
    K: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """All steps of the program's share of the base."""
    STEPS: gl.constexpr = (K + 127) // 128
    lo, hi = _range_of(program, PROGRAMS, (width + 63) // 64 * STEPS)
    for step in range(lo, hi):
        slot = place % _PLACES
        mbarrier.wait(empty.index(slot), (place // _PLACES & 1) ^ 1)
        _pace(full, place, WINDOW)
        mbarrier.expect(full.index(slot), 2 * w_desc.block_type.nbytes)
        n, k = step // STEPS * 64, step % STEPS * 128
        _load(w_desc, [n, k], full.index(slot), tiles.index(2 * slot))
        _load(w_desc, [n, k + 64], full.index(slot), tiles.index(2 * slot + 1))
        mbarrier.arrive(full.index(slot), count=31)
        place += 1


@gluon.jit
def _produce_signs(
    SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, place, program, base_outputs, width,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """All signs of the program's share; returns the next place."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    STEPS: gl.constexpr = (KB + SPREAD - 1) // SPREAD
    e = gl.arange(0, SPREAD * 128, gl.SliceLayout(0, layout))[None, :]
    t = gl.arange(0, TILES, gl.SliceLayout(1, layout))[:, None]
    tiles = (width + 15) // 16
    lo, hi = _range_of(program, PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, _, signed, _ = _segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        tile, end = gl.maximum(lo, g * tiles) - g * tiles, gl.minimum(gl.minimum(hi - g * tiles, tiles), signed)
        words = SLAB.to(gl.pointer_type(gl.int32), bitcast=True) + gl.load(TABLE + at + _SIGN).to(gl.int64) * _WORDS
        for this in range(tile, end, TILES):
            words_at = words + (this + t).to(gl.int64) * (KB * 128) + e
            for half in gl.static_range(2):
                slot = place % _PLACES
                mbarrier.wait(empty.index(slot), (place // _PLACES & 1) ^ 1)
                _pace(full, place, WINDOW)
                for s in gl.static_range(half * 8, min(half * 8 + 8, STEPS)):
                    mask = this + t < end
                    if (s + 1) * SPREAD > KB:
                        mask = mask & (e < (KB - s * SPREAD) * 128)
                    _copy(items.index(slot // 2 * 16 + s), words_at + s * SPREAD * 128, mask)
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                place += 1
    return place


@gluon.jit
def _produce(
    w_desc, SLAB, TABLE, table_stride, SEGMENTS, tiles, items, full, empty, N, width,
    PROGRAMS: gl.constexpr, SHARING: gl.constexpr, K: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr,
    HAS_SIGNS: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The weights of the program's share, in the order in which `_consume` wants them."""
    program = gl.program_id(0)
    KB: gl.constexpr = (K + 255) // 256
    place = program * 0
    if HAS_SIGNS:
        place = _produce_signs(
            SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, place, program, N, width, PROGRAMS, KB, TILES,
            SPREAD, WINDOW,
        )  # fmt: skip
    if program < SHARING:
        _produce_base(w_desc, tiles, full, empty, place, program, width, SHARING, K, WINDOW)


@gluon.jit
def _produce_rows(
    x_desc, x_tiles, full, empty, width, SHARING: gl.constexpr, K: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr
):
    """The steps of x that base steps are multiplied with."""
    program = gl.program_id(0)
    STEPS: gl.constexpr = (K + 127) // 128
    if PDL:
        gdc_wait()
    if program < SHARING:
        lo, hi = _range_of(program, SHARING, (width + 63) // 64 * STEPS)
        for step in range(lo, hi):
            slot = (step - lo) % AHEAD
            mbarrier.wait(empty.index(slot), ((step - lo) // AHEAD & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * x_desc.block_type.nbytes)
            k = step % STEPS * 128
            _load(x_desc, [0, k], full.index(slot), x_tiles.index(2 * slot))
            _load(x_desc, [0, k + 64], full.index(slot), x_tiles.index(2 * slot + 1))


@gluon.jit
def _consume_base(
    OUT, tiles, x_tiles, full, empty, x_full, x_empty, place, program, T, width,
    PROGRAMS: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr, BT: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Partials of the program's share of the base, as `triton_share.base_share` leaves them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    STEPS: gl.constexpr = (K + 127) // 128
    steps = (width + 63) // 64 * STEPS
    lo, hi = _range_of(program, PROGRAMS, steps)
    t = gl.arange(0, BT, gl.SliceLayout(0, layout))[None, :]
    n_64 = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    taken = place * 0
    for tile in range(lo // STEPS, (hi + STEPS - 1) // STEPS):
        before = tile * STEPS
        first, last = gl.maximum(lo, before) - before, gl.minimum(hi - before, STEPS)
        total = gl.zeros([64, BT], gl.float32, layout)
        for _ in range(first, last):
            slot, x_slot = place % _PLACES, taken % AHEAD
            mbarrier.wait(full.index(slot), place // _PLACES & 1)
            mbarrier.wait(x_full.index(x_slot), taken // AHEAD & 1)
            for half in gl.static_range(2):
                total = warpgroup_mma(
                    tiles.index(2 * slot + half), x_tiles.index(2 * x_slot + half).permute((1, 0)), total, is_async=True
                )
            total = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(empty.index(slot), count=1)
            mbarrier.arrive(x_empty.index(x_slot), count=1)
            place += 1
            taken += 1
        n = tile * 64 + n_64
        mask = (t < T) & (n < width)
        sharing = program - _program_of(before, PROGRAMS, steps)
        gl.store(OUT + (sharing * T + t).to(gl.int64) * width + n, total, mask=mask)
        if last == STEPS:
            for more in range(sharing + 1, SPLIT):
                gl.store(OUT + (more * T + t).to(gl.int64) * width + n, gl.zeros_like(total), mask=mask)


@gluon.jit
def _sums(of_words, TILES: gl.constexpr, SPREAD: gl.constexpr):
    """Over the words of an output: [TILES, 8, 2], outputs g and g + 8."""
    lanes = gl.sum(gl.reshape(of_words, (TILES, SPREAD, 8, 4, 2, 2)), 5)
    return gl.sum(gl.sum(lanes, 3), 1)


@gluon.jit
def _consume_signs(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, OUT, items, full, empty, place, program, base_outputs,
    width,
    PROGRAMS: gl.constexpr, KB: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """As `triton_share.sign_share`, of segments of one row; returns the next place."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [TILES, SPREAD], [1, 0])
    STEPS: gl.constexpr = (KB + SPREAD - 1) // SPREAD
    CHAINS: gl.constexpr = 4 if STEPS >= 4 else 1
    e = gl.arange(0, SPREAD * 128, gl.SliceLayout(0, layout))[None, :]
    t = gl.arange(0, TILES, gl.SliceLayout(1, layout))[:, None]
    zeros = gl.zeros([TILES, SPREAD * 128], gl.int32, layout)
    column = e // 4 % 4 * 2 + e % 2 + zeros
    weight = gl.full([TILES, SPREAD * 128], 1, gl.int32, layout) << column
    upper = gl.where(column == 7, -32768, weight * 256)
    mine = (e % 2 + e // 4 % 4 == 0) & (e < 128)  # one of the words of an output
    within = _sums(gl.where(mine, t * 16 + e // 16 % 8 + e // 2 % 2 * 8 + zeros, 0), TILES, SPREAD)
    tiles = (width + 15) // 16
    lo, hi = _range_of(program, PROGRAMS, gl.load(SEGMENTS + 3) * tiles)
    for g in range(lo // tiles, (hi + tiles - 1) // tiles):
        at, row, signed, outputs = _segment(TABLE, table_stride, SEGMENTS, g, base_outputs)
        tile, end = gl.maximum(lo, g * tiles) - g * tiles, gl.minimum(hi - g * tiles, tiles)
        planes = ()
        for s in gl.static_range(STEPS):
            inside = e < (KB - s * SPREAD) * 128
            planes = planes + (gl.load(WORDS + row * (KB * 128) + s * SPREAD * 128 + e + zeros, mask=inside, other=0),)
        x_scale, x_sum = gl.load(XSCALE + row), gl.load(XSUM + row)
        SCALES = (
            SLAB.to(gl.pointer_type(gl.float32), bitcast=True) + gl.load(TABLE + at + _SCALE).to(gl.int64) * _FLOATS
        )
        to = OUT + row.to(gl.int64) * width
        for this in range(tile, gl.minimum(end, signed), TILES):
            n = this * 16 + within
            mask = n < gl.minimum(width, end * 16)
            scale = gl.load(SCALES + n, mask=mask & (n < outputs), other=0.0)
            low, high = (), ()
            for _ in gl.static_range(CHAINS):
                low, high = low + (zeros,), high + (zeros,)
            slot = place % _PLACES
            item = slot // 2 * 16
            for s in gl.static_range(STEPS):
                if s % 8 == 0:
                    mbarrier.wait(full.index(slot + s // 8), place // _PLACES & 1)
                signs = items.index(item + s).load(layout)
                lower, higher = gl.inline_asm_elementwise(
                    _MMA, _OPERANDS, [signs, planes[s], low[0], high[0]], dtype=(gl.int32, gl.int32), is_pure=False,
                    pack=4,
                )  # fmt: skip
                low, high = low[1:] + (lower,), high[1:] + (higher,)
            if STEPS <= 8:
                mbarrier.wait(full.index(slot + 1), place // _PLACES & 1)
            mbarrier.arrive(empty.index(slot), count=1)
            mbarrier.arrive(empty.index(slot + 1), count=1)
            place += 2
            for i in gl.static_range(1, CHAINS):
                low, high = (low[0] + low[i],) + low[1:], (high[0] + high[i],) + high[1:]
            found = _sums(low[0] * weight + high[0] * upper, TILES, SPREAD)
            y = (2 * found - x_sum).to(gl.float32) * (x_scale * scale)
            gl.store(to + n, gl.where(n < outputs, y, 0.0), mask=mask)
        for this in range(gl.maximum(tile, signed), end, TILES):
            n = this * 16 + within
            gl.store(to + n, gl.zeros_like(n).to(gl.float32), mask=n < gl.minimum(width, end * 16))
    return place


@gluon.jit
def _consume(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, BASE, DELTA, tiles, items, x_tiles, full, empty, x_full,
    x_empty, T, N, width,
    PROGRAMS: gl.constexpr, SHARING: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr,
    BT: gl.constexpr, AHEAD: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr, HAS_SIGNS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    KB: gl.constexpr = (K + 255) // 256
    place = program * 0
    if PDL:
        gdc_wait()
    if HAS_SIGNS:
        place = _consume_signs(
            SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, DELTA, items, full, empty, place, program, N,
            width, PROGRAMS, KB, TILES, SPREAD,
        )  # fmt: skip
    if program < SHARING:
        _consume_base(
            BASE, tiles, x_tiles, full, empty, x_full, x_empty, place, program, T, width, SHARING, K, SPLIT, BT, AHEAD
        )


@gluon.jit(do_not_specialize=["T"])
def ring_kernel(
    x_desc, w_desc, BASE, SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, DELTA, T, N, width,
    PROGRAMS: gl.constexpr, SHARING: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr,
    BT: gl.constexpr, AHEAD: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr, HAS_SIGNS: gl.constexpr,
    WINDOW: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid [PROGRAMS]; arguments as `flat_kernel`'s."""
    if PDL:
        gdc_launch_dependents()
    words_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    items = gl.allocate_shared_memory(gl.int32, [8 * _PLACES, TILES, SPREAD * 128], words_layout)
    if _UNDERSCORE:
        tiles = items._reinterpret(w_desc.dtype, [2 * _PLACES, 64, 64], w_desc.layout)
    else:
        tiles = items.reinterpret(w_desc.dtype, [2 * _PLACES, 64, 64], w_desc.layout)
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [2 * AHEAD, BT, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_PLACES):
        mbarrier.init(full.index(i), count=32)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(AHEAD):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _consume,
                (SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, BASE, DELTA, tiles, items, x_tiles, full,
                 empty, x_full, x_empty, T, N, width, PROGRAMS, SHARING, K, SPLIT, BT, AHEAD, TILES,
                 SPREAD, HAS_SIGNS, PDL),
            ),
            (
                _produce,
                (w_desc, SLAB, TABLE, table_stride, SEGMENTS, tiles, items, full, empty, N, width,
                 PROGRAMS, SHARING, K, TILES, SPREAD, HAS_SIGNS, WINDOW),
            ),
            (_produce_rows, (x_desc, x_tiles, x_full, x_empty, width, SHARING, K, AHEAD, PDL)),
        ],
        [1, 1],
        [40, 24],
    )  # fmt: skip


def supports(target: Target, rows: int, kinds: Kinds, device: torch.device | str) -> bool:
    """Whether `ring` takes these, with x and weights of 16 bits."""
    device = torch.device(device)
    plain = not kinds.signs or (kinds.planes == 1 and not kinds.columns and (kinds.single or rows == 1))
    fits = INNER <= target.inputs <= MAX_INPUTS and target.inputs % 8 == 0
    return plain and fits and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def item(target: Target) -> tuple[int, int]:
    """(tiles, spread) of an item of signs: a warp has a tile's columns to itself if its registers hold a row's planes."""
    spread = 1
    while triton.cdiv(target.tiles[1], spread) > 16:
        spread *= 2
    return 4 // spread, spread


def ring(
    x_TK: torch.Tensor, planes: Planes | None, weight_NK: torch.Tensor, target: Target, deltas: DeviceDeltas,
    segments_G4: torch.Tensor, out: Partials, *, programs: int, sharing: int,
) -> None:  # fmt: skip
    """The base's partials in `out.base_STN`, and of segments of one row, where there are planes, signs' in `delta_TN`.

    Args:
        sharing: how many programs have a share of the base. Where none has, somebody else multiplies it.
    """
    rows, width, (tiles, spread) = x_TK.shape[0], out.base_STN.shape[2], item(target)
    assert sharing == 0 or rows <= MAX_ROWS, f"{rows} rows of the base"
    pdl, columns = launches.early(x_TK), max(16, triton.next_power_of_2(rows)) if sharing else 16
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    words = (planes.words_CTW, planes.scale_CT, planes.sum_CT) if planes else (None, None, None)
    ring_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TK, [columns, 64], layout),
        TensorDescriptor.from_tensor(weight_NK, [OUTPUTS, 64], layout),
        out.base_STN, *triton_parts.table_arguments(deltas, target), segments_G4, *words, out.delta_TN,
        rows, target.outputs, width, PROGRAMS=programs, SHARING=sharing, K=target.inputs,
        SPLIT=out.base_STN.shape[0], BT=columns, AHEAD=64 // columns, TILES=tiles, SPREAD=spread,
        HAS_SIGNS=planes is not None, WINDOW=WINDOW, PDL=pdl, num_warps=4, maxnreg=REGISTERS, **launches.options(pdl),
    )  # fmt: skip
