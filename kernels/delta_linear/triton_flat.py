"""A decode-sized linear in one launch: tiles of x W^T and programs of sign products, side by side in one grid.

Base tiles take W as the left operand (64 or 128 outputs on the side where a tensor core wants at least 64 rows) and x^T
as the right one, so that 16 rows waste nothing; K is split where N alone gives too few tiles to keep the memory busy,
and whoever reads the result sums the splits. They come first in the grid, so that sign programs fill what they leave.

Loops around `tl.dot` run to an argument, never to a constant: where one is short and its length known, the ptxas of
Triton 3.6 unrolls it and drops the matrix products of Hopper (their results are 0).
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.delta_linear.triton_items import prefetch, sign_items

_AHEAD = tl.constexpr(512)
"""Columns of W that a waiting program brings to the second-level cache"""


@triton.jit
def base_tile(
    X, W, OUT, tile, split, T, N, width, span,
    K: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """OUT[split, t, n] = sum over the split's part of K of x[t, k] W[n, k], for BN outputs; 0 for n >= N.

    Args:
        T, N, width: rows; outputs of W; columns of OUT, N or more.
        span: columns of W of a split, a multiple of BK.
    """
    n = tile * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    k = split * span + tl.arange(0, BK)
    w_at = W + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    x_at = X + t[None, :] * K + k[:, None]
    if PDL:
        if (K % 8 == 0) & (K >= SPLIT * _AHEAD) & (K % (SPLIT * BK) == 0):
            half = tl.arange(0, 2)[None, :] * (_AHEAD // 2)
            first = W + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + split * span + half
            size = tl.zeros_like(n)[:, None] + half * 0 + _AHEAD * W.dtype.element_ty.primitive_bitwidth // 16
            prefetch(first, size)
        gdc_wait()
    y = tl.zeros((BN, BT), tl.float32)
    for done in tl.range(0, span, BK, num_stages=STAGES):
        if K % (SPLIT * BK) == 0:
            w = tl.load(w_at + done, eviction_policy="evict_first")
            x = tl.load(x_at + done, mask=t[None, :] < T, other=0.0)
        else:
            inside = K - done
            w = tl.load(w_at + done, mask=k[None, :] < inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at + done, mask=(t[None, :] < T) & (k[:, None] < inside), other=0.0)
        y = tl.dot(w, x, y, input_precision="ieee")
    at = OUT + (split * T + t)[None, :].to(tl.int64) * width + n[:, None]
    y = tl.where(n[:, None] < N, y, 0.0)
    tl.store(at, y.to(OUT.dtype.element_ty), mask=(t[None, :] < T) & (n[:, None] < width))
    if PDL:
        gdc_launch_dependents()  # not before: see `launches`


@triton.jit
def flat_kernel(
    X, W, BASE, SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, DELTA,
    T, N, width, span, base_programs, sign_programs, blocks, M1, M2,
    K: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [base_programs + sign_programs]."""
    program = tl.program_id(0)
    if program < base_programs:
        base_tile(
            X, W, BASE, program // SPLIT, program % SPLIT, T, N, width, span, K, SPLIT, BN, BK, BT, STAGES, PDL
        )  # fmt: skip
    else:
        if WORDS is not None:
            sign_items(
                SLAB, TABLE, table_stride, SEGMENTS, program - base_programs, sign_programs, blocks, WORDS, XSCALE,
                XSUM, words_stride, scale_stride, DELTA, N, width, M1, M2,
                KB, TILES, WARPS, MEMBERS, COLUMNS, MANY, LONGEST, PDL,
            )  # fmt: skip
