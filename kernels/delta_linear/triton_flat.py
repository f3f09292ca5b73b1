"""A decode-sized linear in one launch: every program has a share of the base's product and one of the sign products.

Base tiles take W as the left operand (64 or 128 outputs on the side where a tensor core wants at least 64 rows) and x^T
as the right one, so that 16 rows waste nothing. Steps along K of all tiles are dealt out evenly (Stream-K: Osama et al.
2023), and whoever reads the result sums the partials of a tile. There are as many programs as run at once; those that
share a multiprocessor begin with different parts, so that its tensor cores and its loads are busy at the same time.

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

from kernels.delta_linear.triton_share import base_share, sign_share


@triton.jit(do_not_specialize=["T"])
def flat_kernel(
    X, W, BASE, SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, DELTA,
    T, N, width, M1, M2,
    PROGRAMS: tl.constexpr, SHARING: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
    KB: tl.constexpr, TILES: tl.constexpr, SPREAD: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [PROGRAMS], of which the first SHARING have a share of the base."""
    program = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if WORDS is None:
        base_share(X, W, BASE, program, T, N, width, SHARING, K, SPLIT, BN, BK, BT, STAGES)
    else:
        for turn in range(2):
            if (turn == 0) == (program * 2 < PROGRAMS):
                if program < SHARING:
                    base_share(X, W, BASE, program, T, N, width, SHARING, K, SPLIT, BN, BK, BT, STAGES)
            else:
                sign_share(
                    SLAB, TABLE, table_stride, SEGMENTS, program, WORDS, XSCALE, XSUM, words_stride,
                    scale_stride, DELTA, N, width, M1, M2,
                    PROGRAMS, KB, TILES, SPREAD, WARPS, MEMBERS, COLUMNS, MANY, LONGEST, DEPTH, PDL,
                )  # fmt: skip


@triton.jit
def sign_kernel(
    SLAB, TABLE, table_stride, SEGMENTS, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT, N, width, M1, M2,
    PROGRAMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, SPREAD: tl.constexpr, DEPTH: tl.constexpr,
    WARPS: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, MANY: tl.constexpr, LONGEST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The sign products alone. Grid [PROGRAMS]."""
    program = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sign_share(
        SLAB, TABLE, table_stride, SEGMENTS, program, WORDS, XSCALE, XSUM, words_stride, scale_stride, OUT,
        N, width, M1, M2, PROGRAMS, KB, TILES, SPREAD, WARPS, MEMBERS, COLUMNS, MANY, LONGEST, DEPTH, PDL,
    )  # fmt: skip
