"""Low-rank deltas of decode-sized segments: delta += (x A^T) B^T, ranks mixed in one batch.

Two launches, each with all entries in one grid; programs of entries without a low-rank part end at once.

- shrink: [splits x rank blocks, segments]. A's rows are cut into blocks and K into splits; each program writes its part
  of x A^T to the workspace, so that nothing is added atomically and results do not depend on the order of programs. A
  program of a large rank goes on to further blocks, so that the grid does not grow with the largest rank allowed.
- expand: [output tiles, segments]. Sums the splits, multiplies with B, adds to the segment's rows of delta.

x A^T is rounded to the compute dtype between the two, as adapters' own training code does.

After S-LoRA (2311.03285, section 5) and Punica (2310.18547, section 4), whose kernels have one rank per batch or add
splits atomically.
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
from kernels.delta_linear.triton_parts import LORA_A, LORA_B
from kernels.device import DeviceDeltas, Target


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    X, x_stride, SLAB, TABLE, table_stride, SEGMENTS, H, T,
    K: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCKS: tl.constexpr,
    STRIPS: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """H[split, t, r] = the split's part of x[t] A[r]^T. H is [SPLIT, T, WIDTH]."""
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    split, block = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT % BLOCKS
    start += tl.program_id(0) // (SPLIT * BLOCKS) * BT
    rank = parts.rank_of(TABLE, entry * table_stride)
    if (stop <= start) | (rank == 0):
        return
    a = parts.part(SLAB, TABLE, entry * table_stride, LORA_A, X.dtype.element_ty)
    rows: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    for r0 in range(block * BR, MEMBERS * rank, BLOCKS * BR):
        r = r0 + tl.arange(0, BR)
        for t0 in range(start, stop, STRIPS * BT):
            t = t0 + tl.arange(0, BT)
            h = parts.rows_times_matrix(
                X, x_stride, a, t, stop, r, MEMBERS * rank, split * rows, K, rows, BK, STAGES
            )  # fmt: skip
            at = (split * T + t)[:, None].to(tl.int64) * WIDTH + r[None, :]
            tl.store(H + at, h, mask=(t[:, None] < stop) & (r[None, :] < MEMBERS * rank))


@triton.jit
def add_expanded(
    total, H, b, t, stop, n, first, last, rank, column, T, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """total[t, n] += sum over i < rank, s of H[s, t, column + i] b[n, i], for n in first .. last."""
    i = tl.arange(0, BI)
    s = tl.arange(0, SPLIT)
    for i0 in tl.range(0, rank, BI, num_stages=STAGES):
        inside = i0 + i < rank
        at = (s[:, None] * T + t[None, :]).to(tl.int64) * WIDTH + column
        mask = (s[:, None] >= 0) & (t[None, :] < stop)
        # One load of three dimensions: separate ones would each be exchanged between threads for the product.
        h = tl.load(
            H + at[:, :, None] + (i0 + i)[None, None, :], mask=mask[:, :, None] & inside[None, None, :], other=0.0
        )
        here = (n[None, :] >= first) & (n[None, :] < last) & inside[:, None]
        b_at = b + n[None, :].to(tl.int64) * rank + (i0 + i)[:, None]
        total = tl.dot(
            tl.sum(h, 0).to(b.dtype.element_ty), tl.load(b_at, mask=here, other=0.0), total, input_precision="ieee"
        )
    return total


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    H, SLAB, TABLE, table_stride, SEGMENTS, OUT, out_stride, T, N, FIRST_1, FIRST_2, DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT[t, n] += sum over i of H[., t, member(n) * rank + i] B[n, i]."""
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    rank = parts.rank_of(TABLE, entry * table_stride)
    if (stop <= start) | (rank == 0):
        return
    b = parts.part(SLAB, TABLE, entry * table_stride, LORA_B, DTYPE)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    low, high = members_between(tl.program_id(0) * BN, BN, MEMBERS, N, FIRST_1, FIRST_2)
    for t0 in range(start, stop, BT):
        t = t0 + tl.arange(0, BT)
        total = tl.zeros((BT, BN), tl.float32)
        for m in range(low, high + 1):
            first, last = member_span(m, MEMBERS, N, FIRST_1, FIRST_2)
            total = add_expanded(total, H, b, t, stop, n, first, last, rank, m * rank, T, WIDTH, SPLIT, BI, STAGES)
        at = OUT + t[:, None].to(tl.int64) * out_stride + n[None, :]
        mask = (t[:, None] < stop) & (n[None, :] < N)
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, total.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def members_between(n, count, MEMBERS: tl.constexpr, N, FIRST_1, FIRST_2):
    """The first and last member of a fused target that outputs n .. n + count belong to."""
    last = tl.minimum(n + count, N) - 1
    low = n * 0
    high = n * 0
    if MEMBERS > 1:
        low += (n >= FIRST_1).to(tl.int32)
        high += (last >= FIRST_1).to(tl.int32)
    if MEMBERS > 2:
        low += (n >= FIRST_2).to(tl.int32)
        high += (last >= FIRST_2).to(tl.int32)
    return low, high


@triton.jit
def member_span(m, MEMBERS: tl.constexpr, N, FIRST_1, FIRST_2):
    """(first, last) output of member m."""
    first = tl.where(m == 0, 0, tl.where(m == 1, FIRST_1, FIRST_2))
    last = tl.where(m == MEMBERS - 1, N, tl.where(m == 0, FIRST_1, FIRST_2))
    return first, last


MANY_ROWS = 256


@dataclass(frozen=True, slots=True)
class LowRankConfig:
    split: int
    """Parts that K is cut into: a power of two"""
    rows: int = 16
    """Rows of x that are multiplied at once"""
    rank_block: int = 32
    inner: int = 128
    """Inputs that are loaded at once"""
    stages: int = 4
    blocks: int = 8
    """Programs for the rank blocks of one segment and split"""
    strips: int = 1
    """Programs for the row blocks of one segment, split and rank block"""
    outputs: int = 64
    """Of one program of expand"""
    warps: int = 4


def key(target: Target, rows: int, max_rank: int) -> str:
    """What measured configurations are filed under."""
    return f"low rank {target.outputs}x{target.inputs} {triton.next_power_of_2(rows)} {max_rank}"


def choose(target: Target, rows: int, max_rank: int, device: torch.device) -> LowRankConfig:
    """What was measured on this device, else the rule: splits so that a few segments of rank 16 already fill a GPU,
    with programs of 8 KiB or more."""
    found = parts.measured(key(target, rows, max_rank), device)
    if found is not None:
        return LowRankConfig(**found)
    width = len(target.members) * max_rank
    return LowRankConfig(
        split=most_splits(target, rows, max_rank),
        rows=(16 if rows <= 32 else 32) if rows <= MANY_ROWS else 64,
        rank_block=16 if width <= 48 else 32,
        strips=1 if rows <= 64 else 2 if rows <= 128 else 4,
        outputs=64 if rows < 8 or max_rank > 64 else 256 if max_rank == 16 else 128,
        warps=2 if width <= 48 else 4,
    )


def candidates(target: Target, rows: int, max_rank: int) -> list[LowRankConfig]:
    """For a benchmark's sweep."""
    most = most_splits(target, rows, max_rank)
    tall = (16, 32) if rows > 16 else (16,)
    return [
        LowRankConfig(split, x_rows, block, inner, stages, 8, strips, outputs, warps)
        for split in (1, 2, 4, 8, 16)
        if split <= most
        for x_rows in tall
        for block, warps in ((16, 1), (16, 2), (32, 4))
        for inner, stages in ((128, 4), (256, 3))
        for strips in ((1,) if rows <= 64 else (1, 2, 4))
        for outputs in (64, 128, 256)
    ]


def most_splits(target: Target, rows: int, max_rank: int) -> int:
    """No configuration has more: the workspace is made for it. Many rows or ranks fill a GPU with fewer."""
    width = len(target.members) * max_rank
    most = 16 if width <= 32 else 8 if width <= 128 else 4 if width <= 512 else 2
    if rows > MANY_ROWS:
        most //= 2
    return 2 ** (max(1, min(most, target.inputs // 256)).bit_length() - 1)


def workspace_floats(target: Target, rows: int, max_rank: int) -> int:
    """float32 elements that x A^T of a step takes."""
    return most_splits(target, rows, max_rank) * rows * len(target.members) * max_rank


def shrink(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, max_rank: int,
    workspace: torch.Tensor, config: LowRankConfig,
) -> torch.Tensor:  # fmt: skip
    """x A^T in parts, float32 [split, T, members * max_rank], in the workspace. Columns beyond members * rank of the
    row's own variant hold anything, and so do rows of variants without a low-rank part.

    Args:
        workspace: uint8, aligned to 16, at least 4 * `workspace_floats`.
    """
    parts.check_rows(x_TK, target)
    rows, width = x_TK.shape[0], len(target.members) * max_rank
    size = config.split * rows * width
    assert max_rank % 16 == 0, f"rank {max_rank} is not padded to 16"
    assert workspace.numel() >= 4 * size, f"workspace of {workspace.numel()} bytes, {4 * size} needed"
    h = workspace[: 4 * size].view(torch.float32).view(config.split, rows, width)
    blocks = min(config.blocks, triton.cdiv(width, config.rank_block))
    shrink_kernel[(config.split * blocks * config.strips, segments_G4.shape[0])](
        x_TK, x_TK.stride(0), *parts.table_arguments(deltas, target), segments_G4, h, rows,
        K=target.inputs, MEMBERS=len(target.members), WIDTH=width, SPLIT=config.split, BLOCKS=blocks,
        STRIPS=config.strips, BT=config.rows, BR=config.rank_block, BK=config.inner, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return h


def low_rank(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, max_rank: int,
    out_TN: torch.Tensor, workspace: torch.Tensor, *, config: LowRankConfig | None = None,
) -> None:  # fmt: skip
    """Adds the low-rank parts of every segment's variant to its rows of out, which must hold numbers.

    Args:
        max_rank: at least the rank of every entry in the table, a multiple of 16.
        out_TN: float32 or the compute dtype; columns from the target's outputs on are left alone.
        workspace: as `shrink`'s.
    """
    assert out_TN.stride(1) == 1
    config = config or choose(target, x_TK.shape[0], max_rank, x_TK.device)
    h = shrink(x_TK, target, deltas, segments_G4, max_rank, workspace, config)
    first = [*target.members[1:], 0, 0]
    inner = min(32, triton.next_power_of_2(max_rank))
    expand_kernel[(triton.cdiv(target.outputs, config.outputs), segments_G4.shape[0])](
        h, *parts.table_arguments(deltas, target), segments_G4, out_TN, out_TN.stride(0), h.shape[1], target.outputs,
        first[0], first[1], DTYPE=dtype_of(x_TK), MEMBERS=len(target.members), WIDTH=h.shape[2], SPLIT=config.split,
        BT=config.rows, BN=config.outputs, BI=inner, STAGES=1 if max_rank <= inner else 2,
        num_warps=4,
    )  # fmt: skip


def dtype_of(x: torch.Tensor) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[x.dtype]
