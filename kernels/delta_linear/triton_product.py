"""One product for row tiles of many variants: y^T = (W + D) x^T, the sum made in registers (or D alone, added to y).

Grid: [row tiles, output tiles]; the row tiles of one output tile run together and share W's tile in the second-level
cache. The tile of W + D is the left operand, which Hopper's tensor cores take from registers; x's tile is the right
one, from shared memory. The more rows a tile has, the less the sum costs for each: with 256 rows, one addition for 256
multiply-adds.

Low-rank parts are added after the loop, from x A^T that `shrink` made before.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.delta_linear import low_rank_choice, triton_low_rank, triton_parts
from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear import triton_tiles as tiles
from kernels.delta_linear.row_tiles import ROWS
from kernels.delta_linear.triton_parts import DENSE, LORA_B, SCALE, SIGN
from kernels.device import DeviceDeltas, Kinds, Target


@triton.jit
def delta_tile(
    w, SLAB, TABLE, at, planes, n, k0, member, scale, N, K: tl.constexpr, MEMBERS: tl.constexpr,
    PLANES: tl.constexpr, COLUMNS: tl.constexpr, DENSES: tl.constexpr, PACKED: tl.constexpr, BASE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w + D for a tile, in w's type; PACKED but not BASE the signs alone, for the sum to be scaled."""
    if PACKED:
        signs = parts.part(SLAB, TABLE, at, SIGN, tl.uint8)
        there = (n < N) & (tl.zeros_like(n) < planes)
        of_bytes = tiles.sign_bytes(signs, 0, n, there, k0, (N + 15) // 16, (K + 255) // 256, BK)
        total = tiles.add_signed(w, scale, of_bytes, BN, BK) if BASE else tiles.ones(of_bytes, w.dtype, BN, BK)
    else:
        d = tiles.difference(
            SLAB, TABLE, at, planes, n, n < N, k0, member, MEMBERS, N, K, w.dtype, PLANES, COLUMNS, DENSES, BN, BK
        )  # fmt: skip
        total = (w.to(tl.float32) + d).to(w.dtype)
    return total


@triton.jit
def add_low_rank(
    total, H, b, t, stop, n, first, last, rank, column, T, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BI: tl.constexpr
):
    """total[n, t] += sum over i < rank, s of b[n, i] H[s, t, column + i], for n in first .. last."""
    i = tl.arange(0, BI)
    for i0 in tl.range(0, rank, BI, num_stages=1):
        inside = i0 + i < rank
        mask = (t[None, :] < stop) & inside[:, None]
        h = tl.zeros((BI, t.shape[0]), tl.float32)
        for s in tl.static_range(SPLIT):
            at = (s * T + t)[None, :].to(tl.int64) * WIDTH + (column + i0 + i)[:, None]
            h += tl.load(H + at, mask=mask, other=0.0)
        here = ((n >= first) & (n < last))[:, None] & inside[None, :]
        b_tile = tl.load(b + n[:, None].to(tl.int64) * rank + (i0 + i)[None, :], mask=here, other=0.0)
        total = tl.dot(b_tile, h.to(b_tile.dtype), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def product_kernel(
    X, x_stride, W, SLAB, TABLE, table_stride, TILES, H, OUT, out_stride, T, N, inputs, FIRST_1, FIRST_2,
    K: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    BASE: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr, DENSES: tl.constexpr, LOW_RANK: tl.constexpr,
    PACKED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT = x (W + D)^T if BASE, else OUT += x D^T, for the rows of every tile. inputs: K (see triton_flat, loops)."""
    entry, start, stop = parts.segment(TILES, tl.program_id(0) // (ROWS // BT))
    start += tl.program_id(0) % (ROWS // BT) * BT
    at = entry * table_stride
    planes = tl.load(TABLE + at + parts.PLANES)
    rank = parts.rank_of(TABLE, at)
    if start >= stop:
        return
    if (not BASE) & (planes == 0) & (rank == 0) & (tl.load(TABLE + at + DENSE) < 0):
        return
    dtype: tl.constexpr = X.dtype.element_ty
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    t = start + tl.arange(0, BT)
    k = tl.arange(0, BK)
    member = tiles.member_of(n, MEMBERS, FIRST_1, FIRST_2)
    scale = tl.zeros((BN,), tl.float32)
    if PACKED:
        scales = parts.part(SLAB, TABLE, at, SCALE, tl.float32)
        scale = tl.load(scales + n, mask=(n < N) & (tl.zeros_like(n) < planes), other=0.0)
    total = tl.zeros((BN, BT), tl.float32)
    w_row = n[:, None].to(tl.int64) * K + k[None, :]
    x_at = X + t[None, :].to(tl.int64) * x_stride + k[:, None]
    # x D^T of variants that have low-rank parts alone is those parts alone.
    if not BASE:
        inputs = tl.where((planes == 0) & (tl.load(TABLE + at + DENSE) < 0), 0, inputs)
    for k0 in tl.range(0, inputs, BK, num_stages=STAGES):
        w_mask = (n < N)[:, None]
        x_mask = (t < stop)[None, :]
        if K % BK != 0:
            w_mask = w_mask & (k < K - k0)[None, :]
            x_mask = x_mask & (k < K - k0)[:, None]
        w = tl.load(W + w_row + k0, mask=w_mask, other=0.0) if BASE else tl.zeros((BN, BK), dtype)
        x = tl.load(x_at + k0, mask=x_mask, other=0.0)
        if (PLANES > 0) | DENSES:
            w = delta_tile(
                w, SLAB, TABLE, at, planes, n, k0, member, scale, N, K, MEMBERS, PLANES, COLUMNS, DENSES, PACKED,
                BASE, BN, BK,
            )  # fmt: skip
        total = tl.dot(w, x, total, input_precision="ieee")
    if PACKED and not BASE:
        total *= scale[:, None]
    if LOW_RANK:
        b = parts.part(SLAB, TABLE, at, LORA_B, dtype)
        low, high = triton_low_rank.members_between(tl.program_id(1) * BN, BN, MEMBERS, N, FIRST_1, FIRST_2)
        for m in range(low, high + 1):
            first, last = triton_low_rank.member_span(m, MEMBERS, N, FIRST_1, FIRST_2)
            total = add_low_rank(total, H, b, t, stop, n, first, last, rank, m * rank, T, WIDTH, SPLIT, BI)
    y = tl.trans(total)
    y_at = OUT + t[:, None].to(tl.int64) * out_stride + n[None, :]
    y_mask = (t[:, None] < stop) & (n[None, :] < N)
    if not BASE:
        y += tl.load(y_at, mask=y_mask, other=0.0).to(tl.float32)
    tl.store(y_at, y.to(OUT.dtype.element_ty), mask=y_mask)


@dataclass(frozen=True, slots=True)
class ProductConfig:
    rows: int
    """Rows of x at once: a power of two up to ROWS"""
    outputs: int = 128
    inner: int = 64
    stages: int = 3
    warps: int = 8


def choose(rows_per_tile: int, kinds: Kinds, dtype: torch.dtype, device: torch.device) -> ProductConfig:
    """Not measured yet. The largest tile that the rows fill, and the registers and shared memory hold."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    simple = kinds.planes == 1 and not (kinds.columns or kinds.dense)
    most = 256 if hopper and simple else 128
    if dtype == torch.float32:  # twice the shared memory
        return ProductConfig(min(64, max(16, triton.next_power_of_2(rows_per_tile))), outputs=64, stages=2, warps=4)
    rows = min(most, max(16, triton.next_power_of_2(rows_per_tile)))
    return ProductConfig(rows, stages=3 if simple else 2, warps=8 if rows >= 64 else 4)


def candidates(rows_per_tile: int) -> list[ProductConfig]:
    """For a benchmark's sweep."""
    most = min(ROWS, max(16, triton.next_power_of_2(rows_per_tile)))
    return [
        ProductConfig(rows, outputs, inner, stages, warps)
        for rows in sorted({most, max(16, most // 2)})
        for outputs, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
        for inner, stages in ((64, 3), (64, 4), (128, 2))
        if outputs * rows // (32 * warps) <= 128
    ]


def product(
    x_TK: torch.Tensor, weight_NK: torch.Tensor | None, target: Target, deltas: DeviceDeltas, tiles_I4: torch.Tensor,
    kinds: Kinds, out_TN: torch.Tensor, workspace: torch.Tensor, *, config: ProductConfig,
) -> None:  # fmt: skip
    """out = x (W + D)^T for the rows of every tile; without a weight, out += x D^T.

    Args:
        tiles_I4: (entry, start, stop, 0), at most ROWS rows each.
        kinds: byte factors count for nothing here.
        workspace: as `low_rank`'s, where kinds has low-rank deltas.
    """
    triton_parts.check_rows(x_TK, target)
    assert out_TN.stride(1) == 1
    planes = kinds.planes if kinds.signs else 0
    h, width, split = None, 0, 0
    if kinds.rank:
        small = low_rank_choice.choose(target, x_TK.shape[0], kinds.rank, x_TK.device)
        h = triton_low_rank.shrink(x_TK, target, deltas, tiles_I4, kinds.rank, workspace, small)
        split, width = h.shape[0], h.shape[2]
    first = [*target.members[1:], 0, 0]
    # The interpreter, which has CPU tensors, knows no assembly.
    packed = planes == 1 and not (kinds.columns or kinds.dense) and x_TK.dtype.itemsize == 2 and not x_TK.is_cpu
    grid = (tiles_I4.shape[0] * (ROWS // config.rows), triton.cdiv(target.outputs, config.outputs))
    product_kernel[grid](
        x_TK, x_TK.stride(0), weight_NK, *triton_parts.table_arguments(deltas, target), tiles_I4, h,
        out_TN, out_TN.stride(0), x_TK.shape[0], target.outputs, target.inputs, first[0], first[1],
        K=target.inputs, MEMBERS=len(target.members), WIDTH=width, SPLIT=split, ROWS=ROWS, BASE=weight_NK is not None,
        PLANES=planes, COLUMNS=kinds.columns, DENSES=kinds.dense, LOW_RANK=kinds.rank > 0, PACKED=packed,
        BN=config.outputs, BT=config.rows, BK=config.inner, BI=16 if kinds.rank == 16 else 32,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
