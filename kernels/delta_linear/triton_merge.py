"""W + D of one entry and target, written to a scratch matrix that an ordinary product then reads.

Grid: [row tiles, column tiles]. Bytes per weight: 2 read and 2 written, plus the delta's own.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear import triton_tiles as tiles
from kernels.delta_linear.triton_compact_unpack import add_kept
from kernels.delta_linear.triton_parts import LORA_A, LORA_B
from kernels.device import DeviceDeltas, Kinds, Target


@triton.jit
def low_rank_tile(
    SLAB, TABLE, n, inside, k, member, K: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """B[n] A[member, :, k]: float32 [BN, BK]; all of the tile's rows are of one member."""
    rank = parts.rank_of(TABLE, 0)
    a = parts.part(SLAB, TABLE, 0, LORA_A, DTYPE)
    b = parts.part(SLAB, TABLE, 0, LORA_B, DTYPE)
    i = tl.arange(0, 16)
    total = tl.zeros((BN, BK), tl.float32)
    for i0 in tl.range(0, rank, 16, num_stages=1):
        b_tile = tl.load(b + n[:, None].to(tl.int64) * rank + (i0 + i)[None, :], mask=inside[:, None], other=0.0)
        a_at = a + (member * rank + i0 + i)[:, None].to(tl.int64) * K + k[None, :]
        mask = (i0 + i < rank)[:, None]
        if K % BK != 0:
            mask = mask & (k < K)[None, :]
        a_tile = tl.load(a_at, mask=mask, other=0.0)
        total = tl.dot(b_tile, a_tile, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["first", "last"])
def merge_kernel(
    W, SLAB, TABLE, OUT, first, last, N, FIRST_1, FIRST_2, K: tl.constexpr, MEMBERS: tl.constexpr,
    PLANES: tl.constexpr, COLUMNS: tl.constexpr, DENSES: tl.constexpr, LOW_RANK: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """OUT[n - first] = W[n] + D[n] for n in first .. last. TABLE points at the entry's own row."""
    n = first + tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    k = k0 + tl.arange(0, BK)
    inside = n < last
    mask = inside[:, None]
    if K % BK != 0:
        mask = mask & (k < K)[None, :]
    w = tl.load(W + n[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0)
    member = tiles.member_of(n, MEMBERS, FIRST_1, FIRST_2)
    total = w.to(tl.float32) + tiles.difference(
        SLAB, TABLE, 0, tl.load(TABLE + parts.PLANES), n, inside, k0, member, MEMBERS, N, K, W.dtype.element_ty,
        PLANES, COLUMNS, DENSES, BN, BK,
    )  # fmt: skip
    if LOW_RANK:
        total += low_rank_tile(SLAB, TABLE, n, inside, k, tl.min(member, 0), K, W.dtype.element_ty, BN, BK)
    tl.store(OUT + (n - first)[:, None].to(tl.int64) * K + k[None, :], total.to(OUT.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """The default is a rule, not measured: a fragment of signs each; of low-rank parts too a tile must lie within one
    member."""

    rows: int = 16
    columns: int = 256
    warps: int = 4


def candidates(target: Target, kinds: Kinds) -> list[MergeConfig]:
    """For a benchmark's sweep."""
    tall = (16, 32, 64) if all(start % 64 == 0 for start in target.members) or not kinds.rank else (16,)
    return [
        MergeConfig(rows, columns, warps)
        for rows in tall
        for columns in (128, 256, 512)
        for warps in (4, 8)
        if rows * columns // (32 * warps) in (16, 32, 64)
    ]


def merge(
    weight_NK: torch.Tensor, target: Target, deltas: DeviceDeltas, entry: int, kinds: Kinds, out_RK: torch.Tensor,
    *, rows: tuple[int, int] | None = None, config: MergeConfig | None = None,
) -> None:  # fmt: skip
    """out = W + D of the entry, summed in float32 and rounded once, kept values once more. May run on any stream
    while another product runs.

    Args:
        rows: (first, last): only these outputs, which are out's rows; all without it. `first` is a multiple of 16.
        out_RK: contiguous, in the compute dtype.
    """
    first, last = rows or (0, target.outputs)
    assert first % 16 == 0, f"slices begin at multiples of 16, not at {first}"
    assert out_RK.shape == (last - first, target.inputs), f"out {list(out_RK.shape)} for outputs {first} to {last}"
    assert out_RK.is_contiguous()
    assert weight_NK.is_contiguous()
    config = config or MergeConfig()
    starts = [*target.members[1:], 0, 0]
    merge_kernel[(triton.cdiv(last - first, config.rows), triton.cdiv(target.inputs, config.columns))](
        weight_NK, deltas.slab, deltas.table_EJF[entry, target.index], out_RK, first, last, target.outputs,
        starts[0], starts[1], K=target.inputs, MEMBERS=len(target.members), PLANES=kinds.planes if kinds.signs else 0,
        COLUMNS=kinds.columns, DENSES=kinds.dense, LOW_RANK=kinds.rank > 0, BN=config.rows, BK=config.columns,
        num_warps=config.warps,
    )  # fmt: skip
    if kinds.compact:
        add_kept(target, deltas, entry, out_RK, rows=(first, last))
