"""Low-rank deltas of decode-sized segments: delta += (x A^T) B^T, ranks mixed in one batch.

Two launches, each with all entries in one grid; programs of entries without a low-rank part end at once.

- shrink: [splits x rank blocks, segments]. A's rows are cut into blocks and K into splits; each program writes its part
  of x A^T to the workspace, so that nothing is added atomically and results do not depend on the order of programs. A
  program of a large rank goes on to further blocks, so that the grid does not grow with the largest rank allowed.
- expand: [output tiles, segments]. Sums the splits, multiplies with B, adds to the segment's rows of delta, or writes
  them where nobody has before.

x A^T is rounded to the compute dtype between the two, as adapters' own training code does.

Factors are numbers of the compute dtype ("words") or bytes (`triton_bytes`), whose scales shrink applies. Which, an
entry's table row says; a step in which both may occur is compiled with both loops, and each program takes one.

After S-LoRA (2311.03285, section 5) and Punica (2310.18547, section 4), whose kernels have one rank per batch or add
splits atomically.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import launches
from kernels.delta_linear import low_rank_choice, triton_bytes
from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.low_rank_choice import LowRankConfig, choose, choose_bytes
from kernels.delta_linear.triton_parts import LORA_A, LORA_B
from kernels.device import SEGMENT_ROWS, DeviceDeltas, Target


@triton.jit(do_not_specialize=["T", "first", "blocks", "strips"])
def shrink_kernel(
    X, x_stride, SLAB, TABLE, table_stride, SEGMENTS, H, T, first, inputs, blocks, strips,
    K: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr,
    BYTES: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """H[split, t - first, r] = the split's part of x[t] A[r]^T. H is [SPLIT, T, WIDTH]. inputs: K."""
    if PDL:
        gdc_launch_dependents()
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    split, block = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT % blocks
    start += tl.program_id(0) // (SPLIT * blocks) * BT
    rank = parts.rank_of(TABLE, entry * table_stride, WORDS, BYTES)
    if PDL:
        gdc_wait()  # also where nothing is to be done: who comes after relies on it
    if (stop <= start) | (rank == 0):
        return
    rows: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    for r0 in range(block * BR, MEMBERS * rank, blocks * BR):
        r = r0 + tl.arange(0, BR)
        for t0 in range(start, stop, strips * BT):
            t = t0 + tl.arange(0, BT)
            h = shrunk(
                X, x_stride, SLAB, TABLE, entry * table_stride, t, stop, r, MEMBERS * rank, split * rows, inputs, K,
                rows, WORDS, BYTES, PACKED, BK, STAGES,
            )  # fmt: skip
            at = (split * T + t - first)[:, None].to(tl.int64) * WIDTH + r[None, :]
            tl.store(H + at, h, mask=(t[:, None] < stop) & (r[None, :] < MEMBERS * rank))


@triton.jit
def shrunk(
    X, x_stride, SLAB, TABLE, at, t, stop, r, rows, first, inputs, K: tl.constexpr, SPAN: tl.constexpr,
    WORDS: tl.constexpr, BYTES: tl.constexpr, PACKED: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x[t, k] A[r, k]^T over k in first .. first + SPAN, times A's scales: float32 [len t, len r]."""
    if BYTES and (not WORDS or parts.has_bytes(TABLE, at)):
        q = parts.part(SLAB, TABLE, at, LORA_A, tl.int8)
        scales = (q + rows.to(tl.int64) * K).to(tl.pointer_type(tl.float32), bitcast=True)
        span = tl.minimum(SPAN, inputs - first)
        h = tl.trans(
            triton_bytes.bytes_times_rows(
                X, x_stride, q, scales, t, stop, r, rows, first, span, K, BK, STAGES, PACKED
            )
        )  # fmt: skip
    else:
        a = parts.part(SLAB, TABLE, at, LORA_A, X.dtype.element_ty)
        h = parts.rows_times_matrix(X, x_stride, a, t, stop, r, rows, first, K, SPAN, BK, STAGES)
    return h


@triton.jit
def add_expanded(
    total, H, b, t, stop, n, first, last, rank, at, T, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """total[t, n] += sum over i < rank, s of H[s, t, i] b[n, i], for n in first .. last. at: as `triton_bytes`'s."""
    i = tl.arange(0, BI)
    s = tl.arange(0, SPLIT)
    for i0 in tl.range(0, rank, BI, num_stages=STAGES):
        inside = i0 + i < rank
        h_at = H + at + (s[:, None] * T + t[None, :]).to(tl.int64) * WIDTH
        mask = (s[:, None] >= 0) & (t[None, :] < stop)
        # One load of three dimensions: separate ones would each be exchanged between threads for the product.
        h = tl.load(
            h_at[:, :, None] + (i0 + i)[None, None, :], mask=mask[:, :, None] & inside[None, None, :], other=0.0
        )
        here = (n[None, :] >= first) & (n[None, :] < last) & inside[:, None]
        b_at = b + n[None, :].to(tl.int64) * rank + (i0 + i)[:, None]
        total = tl.dot(
            tl.sum(h, 0).to(b.dtype.element_ty), tl.load(b_at, mask=here, other=0.0), total, input_precision="ieee"
        )
    return total


@triton.jit(do_not_specialize=["T", "first"])
def expand_kernel(
    H, SLAB, TABLE, table_stride, SEGMENTS, OUT, out_stride, T, first, N, columns, FIRST_1, FIRST_2,
    DTYPE: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr,
    BYTES: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT[t, n] += sum over i of H[., t - first, member(n) * rank + i] B[n, i], or = where ADD is not set.

    columns: of OUT that are written, N or more.
    """
    if PDL:
        gdc_launch_dependents()
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    rank = parts.rank_of(TABLE, entry * table_stride, WORDS, BYTES)
    if PDL:
        gdc_wait()
    if (stop <= start) | (ADD & (rank == 0)):
        return
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    low, high = members_between(tl.program_id(0) * BN, BN, MEMBERS, N, FIRST_1, FIRST_2)
    for t0 in range(start, stop, BT):
        t = t0 + tl.arange(0, BT)
        total = expanded(
            H, SLAB, TABLE, entry * table_stride, t, stop, first, n, low, high, rank, T, N, FIRST_1, FIRST_2, DTYPE,
            MEMBERS, WIDTH, SPLIT, WORDS, BYTES, PACKED, BI, STAGES,
        )  # fmt: skip
        at = OUT + t[:, None].to(tl.int64) * out_stride + n[None, :]
        mask = (t[:, None] < stop) & (n[None, :] < columns)
        if ADD:
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, total.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def expanded(
    H, SLAB, TABLE, at, t, stop, first, n, low, high, rank, T, N, FIRST_1, FIRST_2, DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr, BYTES: tl.constexpr,
    PACKED: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [len t, len n], of outputs of the members low .. high."""
    origin = 0 - first.to(tl.int64) * WIDTH
    if BYTES and (not WORDS or parts.has_bytes(TABLE, at)):
        q = parts.part(SLAB, TABLE, at, LORA_B, tl.int8)
        turned = tl.zeros((n.shape[0], t.shape[0]), tl.float32)
        for m in range(low, high + 1):
            begin, end = member_span(m, MEMBERS, N, FIRST_1, FIRST_2)
            turned = triton_bytes.add_expanded(
                turned, H, q, t, stop, n, begin, end, rank, origin + m * rank, T, WIDTH, SPLIT, BI, STAGES, DTYPE,
                PACKED,
            )  # fmt: skip
        total = tl.trans(turned)
    else:
        b = parts.part(SLAB, TABLE, at, LORA_B, DTYPE)
        total = tl.zeros((t.shape[0], n.shape[0]), tl.float32)
        for m in range(low, high + 1):
            begin, end = member_span(m, MEMBERS, N, FIRST_1, FIRST_2)
            total = add_expanded(
                total, H, b, t, stop, n, begin, end, rank, origin + m * rank, T, WIDTH, SPLIT, BI, STAGES
            )  # fmt: skip
    return total


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


def shrink(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, max_rank: int,
    workspace: torch.Tensor, config: LowRankConfig, *, words: bool = True, factor_bytes: bool = False,
    span: tuple[int, int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """x A^T in parts, float32 [split, T, members * max_rank], in the workspace. Columns beyond members * rank of the
    row's own variant hold anything, and so do rows of variants without a low-rank part.

    Args:
        workspace: uint8, aligned to 16, at least 4 * `workspace_floats`.
        words, factor_bytes: which factors entries may have; of others nothing is written.
        span: (first, stop): the segments have these rows alone, and T is their number.
    """
    parts.check_rows(x_TK, target)
    first, stop = span or (0, x_TK.shape[0])
    rows, width = stop - first, len(target.members) * max_rank
    size = config.split * rows * width
    assert max_rank % 16 == 0, f"rank {max_rank} is not padded to 16"
    assert workspace.numel() >= 4 * size, f"workspace of {workspace.numel()} bytes, {4 * size} needed"
    h = workspace[: 4 * size].view(torch.float32).view(config.split, rows, width)
    segments, pdl = segments_G4.shape[0], launches.early(x_TK)
    blocks = low_rank_choice.shrink_blocks(config, width, segments)
    shrink_kernel[(config.split * blocks * config.strips, segments)](
        x_TK, x_TK.stride(0), *parts.table_arguments(deltas, target), segments_G4, h, rows, first, target.inputs,
        blocks, config.strips, K=target.inputs, MEMBERS=len(target.members), WIDTH=width, SPLIT=config.split,
        WORDS=words, BYTES=factor_bytes, PACKED=_is_packed(x_TK), BT=config.rows,
        BR=config.rank_block, BK=config.inner, STAGES=config.stages, PDL=pdl, num_warps=config.warps,
        **launches.options(pdl),
    )  # fmt: skip
    return h


def low_rank(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, max_rank: int,
    out_TN: torch.Tensor, workspace: torch.Tensor, *, byte_rank: int = 0, longest: int = SEGMENT_ROWS,
    span: tuple[int, int] | None = None, add: bool = True, config: LowRankConfig | None = None,
) -> None:  # fmt: skip
    """Adds the low-rank parts of every segment's variant to its rows of out, which must hold numbers.

    Args:
        max_rank: at least the rank of every entry in the table, a multiple of 16; 0: none has factors in x's dtype, or
            they are not wanted.
        out_TN: float32 or the compute dtype; columns from the target's outputs on are left alone.
        workspace, span: as `shrink`'s.
        byte_rank: the same of byte factors.
        longest: rows of the longest segment, if there are byte factors.
        add: False: the segments' rows are overwritten, in all columns, with zeros where there are no factors.
    """
    assert out_TN.stride(1) == 1
    span = span or (0, x_TK.shape[0])
    rank = max(max_rank, low_rank_choice.byte_rank(target, byte_rank))
    if config is None and byte_rank:
        segments = segments_G4.shape[0]
        config = choose_bytes(target, span[1] - span[0], segments, rank, x_TK.device, longest=longest)
    config = config or choose(target, x_TK.shape[0], max_rank, x_TK.device)
    kinds = {"words": max_rank > 0, "factor_bytes": byte_rank > 0}
    h = shrink(x_TK, target, deltas, segments_G4, rank, workspace, config, span=span, **kinds)
    _expand(x_TK, h, target, deltas, segments_G4, rank, out_TN, config, span[0], add=add, **kinds)


def _expand(
    x_TK: torch.Tensor, h: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, rank: int,
    out_TN: torch.Tensor, config: LowRankConfig, first_row: int, *, add: bool, words: bool, factor_bytes: bool,
) -> None:  # fmt: skip
    first, columns = [*target.members[1:], 0, 0], target.outputs if add else out_TN.shape[1]
    stages, pdl = 3 if factor_bytes and not words else 2, launches.early(x_TK)
    inner = low_rank_choice.expanded_ranks(config, rank, 2 if factor_bytes else 1)
    expand_kernel[(triton.cdiv(columns, config.outputs), segments_G4.shape[0])](
        h, *parts.table_arguments(deltas, target), segments_G4, out_TN, out_TN.stride(0), h.shape[1], first_row,
        target.outputs, columns, first[0], first[1], DTYPE=dtype_of(x_TK), MEMBERS=len(target.members),
        WIDTH=h.shape[2], SPLIT=config.split, WORDS=words, BYTES=factor_bytes, PACKED=_is_packed(x_TK), BT=config.rows,
        BN=config.outputs, BI=inner, STAGES=1 if rank <= inner else stages,
        ADD=add, PDL=pdl, num_warps=max(config.warps, config.outputs // 32) if factor_bytes else 4,
        **launches.options(pdl),
    )  # fmt: skip


def _is_packed(x_TK: torch.Tensor) -> bool:
    """The interpreter, which has CPU tensors, knows no assembly."""
    return x_TK.dtype.itemsize == 2 and not x_TK.is_cpu


def dtype_of(x: torch.Tensor) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[x.dtype]
