"""A decode-sized linear on Hopper whose weights are under way before its rows are there.

As `triton_flat`, with the same shares and results, but other hands. One warp of a program copies its whole share, signs
and base tiles, through one ring in shared memory. It waits for room alone: neither for the kernel before, as
weights do not depend on it, nor between a tile and the next, a segment and the next, or signs and base. So the
memory is busy while norm and attention run. Another warp copies x for base tiles, four warps multiply.

The ring's places hold 16 KB each: a step of a base tile (64 outputs x 128 inputs), or half of an item of signs: the
first or last 8 of 16 steps of TILES tiles. Two programs leave of a multiprocessor of an H200 16384 registers and 8 KB:
enough for a program of the norm, which waits there while this one ends. With 1 KB it is not, and a step of 16 variants
took 5 % longer.

Not covered: other chips, several planes, several rows of a variant (`gluon_rows`); K above 16384.
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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import launches
from kernels.delta_linear import triton_parts
from kernels.delta_linear.gluon_parts import ARRIVALS, UNDERSCORE
from kernels.delta_linear.gluon_ring_base import consume_base, produce_base, produce_rows
from kernels.delta_linear.gluon_ring_signs import FIRST_WINDOW, PLACES, WINDOW, consume_signs, produce_signs
from kernels.device import DeviceDeltas, Kinds, Partials, Target

OUTPUTS, INNER = 64, 128
"""Of a step of the base"""
MAX_INPUTS, MAX_ROWS = 16384, 32
REGISTERS = 96
"""Of a thread at launch; those that multiply take what those that copy leave"""


@gluon.jit
def _produce(
    w_desc, SLAB, TABLE, table_stride, SEGMENTS, tiles, items, full, empty, N, width, M1, M2,
    PROGRAMS: gl.constexpr, SHARING: gl.constexpr, K: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr,
    MEMBERS: gl.constexpr, HAS_SIGNS: gl.constexpr,
):  # fmt: skip
    """The weights of the program's share, in the order in which `_consume` wants them."""
    program = gl.program_id(0)
    KB: gl.constexpr = (K + 255) // 256
    place = program * 0
    if HAS_SIGNS:
        place = produce_signs(
            SLAB, TABLE, table_stride, SEGMENTS, items, full, empty, place, program, N, width, M1, M2, PROGRAMS, KB,
            TILES, SPREAD, MEMBERS,
        )  # fmt: skip
    if program < SHARING:
        produce_base(w_desc, tiles, full, empty, place, program, width, SHARING, K, PLACES, FIRST_WINDOW, WINDOW)


@gluon.jit
def _consume(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, BASE, DELTA, tiles, items,
    x_tiles, full, empty, x_full, x_empty, T, N, width, M1, M2,
    PROGRAMS: gl.constexpr, SHARING: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr, BT: gl.constexpr,
    AHEAD: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr, MEMBERS: gl.constexpr, HAS_SIGNS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    KB: gl.constexpr = (K + 255) // 256
    place = program * 0
    if PDL:
        gdc_wait()
    if HAS_SIGNS:
        place = consume_signs(
            SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, DELTA, items, full,
            empty, place, program, N, width, M1, M2, PROGRAMS, KB, TILES, SPREAD, MEMBERS,
        )  # fmt: skip
    if program < SHARING:
        consume_base(
            BASE, tiles, x_tiles, full, empty, x_full, x_empty, place, program, T, width, SHARING, K, SPLIT, BT, AHEAD,
            PLACES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["T"])
def ring_kernel(
    x_desc, w_desc, BASE, SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, DELTA,
    T, N, width, M1, M2,
    PROGRAMS: gl.constexpr, SHARING: gl.constexpr, K: gl.constexpr, SPLIT: gl.constexpr, BT: gl.constexpr,
    AHEAD: gl.constexpr, TILES: gl.constexpr, SPREAD: gl.constexpr, MEMBERS: gl.constexpr, HAS_SIGNS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Grid [PROGRAMS]; arguments as `flat_kernel`'s."""
    if PDL:
        gdc_launch_dependents()
    words_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    items = gl.allocate_shared_memory(gl.int32, [8 * PLACES, TILES, SPREAD * 128], words_layout)
    if UNDERSCORE:
        tiles = items._reinterpret(w_desc.dtype, [2 * PLACES, 64, 64], w_desc.layout)
    else:
        tiles = items.reinterpret(w_desc.dtype, [2 * PLACES, 64, 64], w_desc.layout)
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [AHEAD, BT, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(AHEAD):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _consume,
                (SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, BASE, DELTA,
                 tiles, items, x_tiles, full, empty, x_full, x_empty, T, N, width, M1, M2, PROGRAMS, SHARING, K, SPLIT,
                 BT, AHEAD, TILES, SPREAD, MEMBERS, HAS_SIGNS, PDL),
            ),
            (
                _produce,
                (w_desc, SLAB, TABLE, table_stride, SEGMENTS, tiles, items, full, empty, N, width, M1, M2, PROGRAMS,
                 SHARING, K, TILES, SPREAD, MEMBERS, HAS_SIGNS),
            ),
            (produce_rows, (x_desc, x_tiles, x_full, x_empty, width, SHARING, K, AHEAD, PDL)),
        ],
        [1, 1],
        [40, 24],
    )  # fmt: skip


def supports(target: Target, kinds: Kinds, device: torch.device | str) -> bool:
    """Whether `ring` or, signs of several rows of a variant, `gluon_rows` take these, with x and weights of 16 bits."""
    device = torch.device(device)
    fits = INNER <= target.inputs <= MAX_INPUTS and target.inputs % 8 == 0
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return hopper and fits and (not kinds.signs or kinds.planes == 1)


def item(target: Target) -> tuple[int, int]:
    """(tiles, spread) of an item of signs. A warp has a tile's columns to itself if registers hold a row's planes."""
    spread = 1
    while triton.cdiv(target.tiles[1], spread) > 16:
        spread *= 2
    return 4 // spread, spread


def ring(
    x_TK: torch.Tensor, planes: list[torch.Tensor | int | None], weight_NK: torch.Tensor, target: Target,
    deltas: DeviceDeltas, segments_G4: torch.Tensor, kinds: Kinds, out: Partials, first_tiles: tuple[int, int], *,
    programs: int, sharing: int,
) -> None:  # fmt: skip
    """The base's partials in `out.base_STN`, and signs' products with segments of one row in `delta_TN`.

    Args:
        planes: `device.plane_arguments`. first_tiles: of the second and third member, `device.member_tiles`.
        sharing: how many programs have a share of the base. Where none has, somebody else multiplies it.
    """
    rows, width, (tiles, spread) = x_TK.shape[0], out.base_STN.shape[2], item(target)
    assert sharing == 0 or rows <= MAX_ROWS, f"{rows} rows of the base"
    pdl, columns = launches.early(x_TK), max(16, triton.next_power_of_2(rows)) if sharing else 16
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ring_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TK, [columns, 64], layout),
        TensorDescriptor.from_tensor(weight_NK, [OUTPUTS, 64], layout),
        out.base_STN, *triton_parts.table_arguments(deltas, target), segments_G4, *planes, out.delta_TN,
        rows, target.outputs, width, *first_tiles, PROGRAMS=programs, SHARING=sharing, K=target.inputs,
        SPLIT=out.base_STN.shape[0], BT=columns, AHEAD=96 // columns, TILES=tiles, SPREAD=spread,
        MEMBERS=len(target.members) if kinds.columns else 1, HAS_SIGNS=kinds.signs, PDL=pdl,
        num_warps=4, maxnreg=REGISTERS, **launches.options(pdl),
    )  # fmt: skip
