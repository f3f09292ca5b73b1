"""The base's part of `gluon_ring`: steps of 64 outputs x 128 inputs, in the shares of `triton_share.base_share`."""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from kernels.delta_linear.gluon_parts import ARRIVALS, await_room, load_box, slot_of
from kernels.delta_linear.triton_share import program_of, range_of


@gluon.jit
def produce_base(
    w_desc, tiles, full, empty, place, program, width,
    PROGRAMS: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr, FIRST: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """All steps of the program's share."""
    STEPS: gl.constexpr = (K + 127) // 128
    lo, hi = range_of(program, PROGRAMS, (width + 63) // 64 * STEPS)
    for step in range(lo, hi):
        slot = await_room(full, empty, place, PLACES, FIRST, WINDOW)
        mbarrier.expect(full.index(slot), 2 * w_desc.block_type.nbytes)
        n, k = step // STEPS * 64, step % STEPS * 128
        load_box(w_desc, [n, k], full.index(slot), tiles.index(2 * slot))
        load_box(w_desc, [n, k + 64], full.index(slot), tiles.index(2 * slot + 1))
        mbarrier.arrive(full.index(slot), count=ARRIVALS - 1)
        place += 1


@gluon.jit
def produce_rows(
    x_desc, x_tiles, full, empty, width,
    PROGRAMS: gl.constexpr, K: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The rows that those are multiplied with, 64 inputs at a time, in a ring of their own of AHEAD places. A warp's
    whole work: it waits for the kernel that makes them."""
    STEPS: gl.constexpr = (K + 127) // 128
    if PDL:
        gdc_wait()
    program = gl.program_id(0)
    if program < PROGRAMS:
        lo, hi = range_of(program, PROGRAMS, (width + 63) // 64 * STEPS)
        for place in range(2 * (hi - lo)):
            slot, k = place % AHEAD, (lo + place // 2) % STEPS * 128 + place % 2 * 64
            mbarrier.wait(empty.index(slot), place // AHEAD & 1 ^ 1)
            mbarrier.expect(full.index(slot), x_desc.block_type.nbytes)
            load_box(x_desc, [0, k], full.index(slot), x_tiles.index(slot))


@gluon.jit
def consume_base(
    OUT, tiles, x_tiles, full, empty, x_full, x_empty, place, program, T, width,
    PROGRAMS: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr, BT: gl.constexpr, AHEAD: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """Partials as `triton_share.base_share` leaves them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    STEPS: gl.constexpr = (K + 127) // 128
    steps = (width + 63) // 64 * STEPS
    lo, hi = range_of(program, PROGRAMS, steps)
    t = gl.arange(0, BT, gl.SliceLayout(0, layout))[None, :]
    n_64 = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    taken = place * 0
    for tile in range(lo // STEPS, (hi + STEPS - 1) // STEPS):
        before = tile * STEPS
        first, last = gl.maximum(lo, before) - before, gl.minimum(hi - before, STEPS)
        total = gl.zeros([64, BT], gl.float32, layout)
        for _ in range(first, last):
            slot, phase = slot_of(place, PLACES)
            mbarrier.wait(full.index(slot), phase)
            for half in gl.static_range(2):
                x_place = taken + half
                mbarrier.wait(x_full.index(x_place % AHEAD), x_place // AHEAD & 1)
                x = x_tiles.index(x_place % AHEAD).permute((1, 0))
                total = warpgroup_mma(tiles.index(2 * slot + half), x, total, is_async=True)
            total = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(empty.index(slot), count=1)
            mbarrier.arrive(x_empty.index(taken % AHEAD), count=1)
            mbarrier.arrive(x_empty.index((taken + 1) % AHEAD), count=1)
            place += 1
            taken += 2
        n = tile * 64 + n_64
        mask = (t < T) & (n < width)
        sharing = program - program_of(before, PROGRAMS, steps)
        gl.store(OUT + (sharing * T + t).to(gl.int64) * width + n, total, mask=mask)
        if last == STEPS:
            for more in range(sharing + 1, SPLIT):
                gl.store(OUT + (more * T + t).to(gl.int64) * width + n, gl.zeros_like(total), mask=mask)
