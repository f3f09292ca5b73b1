"""y^T = (W + D) x^T on Hopper, for signs of one plane without column scales: loads, sums and products overlap.

Three groups of warps, which meet only at barriers in shared memory: one warp copies tiles of W and x there (bulk tensor
copies), two groups of four warps each own 64 of a tile's 128 outputs. Such a group takes its weights into registers as
tensor cores want them, adds the signs, and multiplies. The two take turns, and each makes the weights of its next step
while tensor cores work on this one: every other step in other registers, and done before it waits for anything, or the
assembler would put the additions behind the wait. Programs stay and go on to further tiles, so that copies for the next
tile run while the last one is written.

A thread has of a row of 64 weights the columns 8 j + 2 q and 8 j + 2 q + 1 (q its place among four). So of each word of
signs it needs two neighbouring bits in every byte: two shifts bring them to the tops of bytes, one byte permutation per
pair puts them where the signs of two 16-bit numbers are.

Not covered: other chips, column scales, several planes, low-rank and dense parts; K that 64 does not divide.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.delta_linear import triton_parts
from kernels.delta_linear.gluon_parts import load_box
from kernels.delta_linear.triton_parts import SCALE, SIGN
from kernels.device import UNIT, DeviceDeltas, Kinds, Target

OUTPUTS, INNER, GROUP_OUTPUTS = 128, 64, 64
_STAGES = {256: 4, 128: 6, 64: 8}
"""Of each size of row tiles: as many as 192 KB of shared memory hold"""
_TIME = {256: 1.0, 128: 0.6, 64: 0.5}
"""Of a tile of each size, beside the largest. With these the choice was within 1 % of the fastest size, in the mean of
44 cases on an H200."""
_UNIT = gl.constexpr(UNIT)
_PLANES = triton_parts.PLANES
# $1: two weights. $2, $4: the word with the first or second sign at the top of each byte. $6: which byte. $8: the
# scale, negated, twice.
_ADD_BF16 = gl.constexpr("""{ .reg .b32 t, one;
mov.b32 one, 0x3F803F80;
prmt.b32 t, $2, $4, $6;
lop3.b32 t, t, 0x80008000, $8, 0x6A;
fma.rn.bf16x2 $0, $1, one, t; }""")
_ADD_FP16 = gl.constexpr("""{ .reg .b32 t;
prmt.b32 t, $2, $4, $6;
lop3.b32 t, t, 0x80008000, $8, 0x6A;
add.rn.f16x2 $0, $1, t; }""")


@gluon.jit
def _words(SIGNS, row, k0, K: gl.constexpr, valid):
    """The two words of signs of each row from column k0 on."""
    valid = valid & (row * 0 + k0 < K)
    at = SIGNS + row + k0 // 256 * 128 + k0 // 128 % 2 * 2 + k0 // 32 % 4 * 4
    return gl.load(at, mask=valid, other=0), gl.load(at + 4, mask=valid, other=0)


@gluon.jit
def _weights(
    w_tiles, full, step, words, column, byte, negated, GROUP: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr
):
    """The weights of a step, in registers as tensor cores want them, and what the signs of its 64 columns add."""
    zeros = gl.zeros_like(byte)
    word = gl.where(column < 32, words[0][:, None] + zeros, words[1][:, None] + zeros)
    upper = word << (7 - column % 8 // 2 * 2)
    lower = word << (6 - column % 8 // 2 * 2)
    mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
    w = w_tiles.index(2 * (step % STAGES) + GROUP).load(negated.type.layout)
    return gl.inline_asm_elementwise(
        ADD, "=r,r,r,r,r,r,r,r,r", [w, upper, lower, byte, negated], dtype=w.dtype, is_pure=True, pack=2
    )


@gluon.jit
def _begin(w, x_tiles, turns, step, total, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """The product of a step, after which it is the other group's turn. Until it is done, w's registers are its own."""
    total = warpgroup_mma(w, x_tiles.index(step % STAGES).permute((1, 0)), total, is_async=True)
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    return total


@gluon.jit
def _await_turn(turns, step, GROUP: gl.constexpr):
    mbarrier.wait(turns.index(GROUP), step & 1 ^ 1 - GROUP)


@gluon.jit
def _end(total, empty, step, STAGES: gl.constexpr):
    """Wait for the product of a step, and give the place of its tiles back."""
    total = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(total,)))
    mbarrier.arrive(empty.index(step % STAGES), count=1)
    return total


@gluon.jit
def _produce(
    x_desc, w_desc, TILES, x_tiles, w_tiles, full, empty, row_tiles, tiles, K: gl.constexpr, STAGES: gl.constexpr
):
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        start = gl.load(TILES + tile % row_tiles * 4 + 1)
        n = tile // row_tiles * 128
        for k0 in range(0, K, 64):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), x_desc.block_type.nbytes + 2 * w_desc.block_type.nbytes)
            load_box(x_desc, [start, k0], full.index(stage), x_tiles.index(stage))
            load_box(w_desc, [n, k0], full.index(stage), w_tiles.index(2 * stage))
            load_box(w_desc, [n + 64, k0], full.index(stage), w_tiles.index(2 * stage + 1))
            step += 1


@gluon.jit
def _consume(
    SLAB, TABLE, table_stride, TILES, OUT, out_stride, x_tiles, w_tiles, full, empty, turns, row_tiles, tiles, N,
    GROUP: gl.constexpr, K: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = OUT.dtype.element_ty
    total_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    w_layout: gl.constexpr = gl.DotOperandLayout(0, total_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, w_layout)
    out_layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    ADD: gl.constexpr = _ADD_BF16 if dtype == gl.bfloat16 else _ADD_FP16
    column = gl.arange(0, 64, gl.SliceLayout(0, w_layout))[None, :]
    byte = gl.convert_layout(column // 8 % 4 * 0x1010 + 0x4000, w_layout) + gl.zeros([64, 64], gl.int32, w_layout)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        entry = gl.load(TILES + tile % row_tiles * 4)
        start = gl.load(TILES + tile % row_tiles * 4 + 1)
        stop = gl.load(TILES + tile % row_tiles * 4 + 2)
        n0 = tile // row_tiles * 128 + GROUP * 64
        row = TABLE + entry * table_stride
        planes = gl.load(row + _PLANES)
        signs = SLAB.to(gl.pointer_type(gl.int32), bitcast=True) + gl.load(row + SIGN).to(gl.int64) * (_UNIT // 4)
        scales = SLAB.to(gl.pointer_type(gl.float32), bitcast=True) + gl.load(row + SCALE).to(gl.int64) * (_UNIT // 4)
        n = n0 + gl.arange(0, 64, row_layout)
        valid = (n < N) & (n * 0 < planes)
        negated = (-gl.load(scales + n, mask=valid, other=0.0)).to(dtype)[:, None] + gl.zeros([64, 64], dtype, w_layout)
        fragment = (n // 16 * ((K + 255) // 256)).to(gl.int64) * 128 + n % 8 * 16 + n % 16 // 8
        one = _words(signs, fragment, 0, K, valid)
        other = _words(signs, fragment, 64, K, valid)
        total = warpgroup_mma_init(gl.zeros([64, BT], gl.float32, total_layout))
        even = _weights(w_tiles, full, step, one, column, byte, negated, GROUP, STAGES, ADD)
        _await_turn(turns, step, GROUP)
        for k0 in range(0, (K - 64) // 128 * 128, 128):
            total = _begin(even, x_tiles, turns, step, total, GROUP, STAGES)
            one = _words(signs, fragment, k0 + 128, K, valid)
            odd = _weights(w_tiles, full, step + 1, other, column, byte, negated, GROUP, STAGES, ADD)
            _await_turn(turns, step + 1, GROUP)
            total = _end(total, empty, step, STAGES)
            total = _begin(odd, x_tiles, turns, step + 1, total, GROUP, STAGES)
            other = _words(signs, fragment, k0 + 192, K, valid)
            even = _weights(w_tiles, full, step + 2, one, column, byte, negated, GROUP, STAGES, ADD)
            _await_turn(turns, step + 2, GROUP)
            total = _end(total, empty, step + 1, STAGES)
            step += 2
        total = _begin(even, x_tiles, turns, step, total, GROUP, STAGES)
        if K % 128 == 0:
            odd = _weights(w_tiles, full, step + 1, other, column, byte, negated, GROUP, STAGES, ADD)
            _await_turn(turns, step + 1, GROUP)
            total = _end(total, empty, step, STAGES)
            step += 1
            total = _begin(odd, x_tiles, turns, step, total, GROUP, STAGES)
        total = _end(total, empty, step, STAGES)
        step += 1
        y = gl.convert_layout(warpgroup_mma_wait(0, deps=(total,)).to(dtype), out_layout)
        out_n = n0 + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        t = start + gl.arange(0, BT, gl.SliceLayout(0, out_layout))
        at = OUT + t[None, :].to(gl.int64) * out_stride + out_n[:, None]
        gl.store(at, y, mask=(t[None, :] < stop) & (out_n[:, None] < N))


@gluon.jit(do_not_specialize=["row_tiles", "tiles"])
def product_kernel(
    x_desc, w_desc, SLAB, TABLE, table_stride, TILES, OUT, out_stride, row_tiles, tiles, N,
    K: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BT, 64], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 64, 64], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                _consume,
                (SLAB, TABLE, table_stride, TILES, OUT, out_stride, x_tiles, w_tiles, full, empty, turns, row_tiles,
                 tiles, N, 0, K, BT, STAGES),
            ),
            (
                _consume,
                (SLAB, TABLE, table_stride, TILES, OUT, out_stride, x_tiles, w_tiles, full, empty, turns, row_tiles,
                 tiles, N, 1, K, BT, STAGES),
            ),
            (_produce, (x_desc, w_desc, TILES, x_tiles, w_tiles, full, empty, row_tiles, tiles, K, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def tile_rows(target: Target, tiles: Mapping[int, int], programs: int) -> int:
    """The size whose tiles, so many of each, take the least time: programs take equal numbers of them in turn."""
    columns = triton.cdiv(target.outputs, OUTPUTS)
    return min(tiles, key=lambda size: triton.cdiv(tiles[size] * columns, programs) * _TIME[size])


def supports(x_TK: torch.Tensor, weight_NK: torch.Tensor, target: Target, kinds: Kinds) -> bool:
    """Whether `product` takes these."""
    simple = kinds.signs and kinds.planes == 1 and not (kinds.columns or kinds.dense or kinds.rank)
    fits = target.inputs % INNER == 0 and x_TK.dtype.itemsize == 2
    aligned = x_TK.data_ptr() % 16 == 0 and x_TK.stride(0) % 8 == 0 and weight_NK.data_ptr() % 16 == 0
    hopper = x_TK.is_cuda and torch.cuda.get_device_capability(x_TK.device)[0] == 9
    return simple and fits and aligned and hopper


def product(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, target: Target, deltas: DeviceDeltas, tiles_I4: torch.Tensor,
    out_TN: torch.Tensor, *, rows: int, programs: int,
) -> None:  # fmt: skip
    """out = x (W + D)^T for the rows of every tile.

    Args:
        tiles_I4: (entry, start, stop, 0), at most `rows` rows each.
        rows: one of SIZES.
        programs: one for each multiprocessor: all of its shared memory and registers are used.
    """
    triton_parts.check_rows(x_TK, target)
    assert out_TN.stride(1) == 1
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row_tiles, tiles = tiles_I4.shape[0], tiles_I4.shape[0] * -(-target.outputs // OUTPUTS)
    product_kernel[(min(programs, tiles),)](
        TensorDescriptor.from_tensor(x_TK, [rows, INNER], layout),
        TensorDescriptor.from_tensor(weight_NK, [GROUP_OUTPUTS, INNER], layout),
        *triton_parts.table_arguments(deltas, target), tiles_I4, out_TN, out_TN.stride(0), row_tiles, tiles,
        target.outputs, K=target.inputs, BT=rows, STAGES=_STAGES[rows], num_warps=4,
    )  # fmt: skip
