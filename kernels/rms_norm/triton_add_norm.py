"""The kernel behind `device.add_norm`."""

# Triton's language is not Python's types:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.device import FIELDS
from kernels.planes import eights, store_row, sum_partials
from kernels.rows import vector_pointer

_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _stream(
    RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, k, T,
    K: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Columns k of the residual stream after its addition, float32, rounded as it is stored."""
    mask = k < K
    x = tl.load(RESIDUAL + source.to(tl.int64) * K + k, mask=mask, other=0.0).to(tl.float32)
    if SPLIT > 0:
        added = sum_partials(BASE, DELTA, source, k, mask, T, K, entry, SPLIT, HAS_DELTA)
        if HAS_BIAS:
            added += tl.load(vector_pointer(SLAB, STARTS, entry, bias) + k, mask=mask, other=0.0).to(tl.float32)
        x = (x + added).to(RESIDUAL.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _scaled(x, rstd, weight):
    """In the compute dtype: rounded before the weight and after it, as transformers does."""
    return ((x * rstd).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)


@triton.jit(do_not_specialize=["T", "target", "targets", "scale_stride"])
def add_norm_kernel(
    RESIDUAL, BASE, DELTA, SLAB, STARTS, ENTRY, ROWS, RESIDUAL_OUT, OUT, WORDS, SCALE, SUM, FLOATS, TABLE,
    eps, T, weight, bias, target, targets, words_stride, scale_stride,
    K: tl.constexpr, KP: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr, KEEP: tl.constexpr, PLANES: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
    KS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part): reads the row, writes a slice and its planes. Without planes a row has one, for all.

    Args:
        weight, bias: where they begin in each entry's block of vectors.
        SPLIT: base partials; 0: nothing is added. KEEP: write RESIDUAL_OUT. HAS_ROWS: of ROWS[row], not of row.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    part = tl.program_id(1)
    source = row
    if HAS_ROWS:
        source = tl.load(ROWS + row)
    entry = tl.load(ENTRY + source)
    k = tl.arange(0, KP)
    WEIGHT = vector_pointer(SLAB, STARTS, entry, weight)
    w = tl.load(WEIGHT + k, mask=k < K, other=0.0)
    if PLANES:
        at = eights(part * KS, KS)
        w_1 = tl.load(WEIGHT + at, mask=at < K, other=0.0)
        w_2 = tl.load(WEIGHT + at + 4, mask=at + 4 < K, other=0.0)
        TABLE_ROW = TABLE + (entry * targets + target) * _FIELDS
    if PDL:
        gdc_wait()
    x = _stream(RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, k, T, K, SPLIT, HAS_DELTA, HAS_BIAS)
    if PLANES:
        # Requested with the row, not behind its norm.
        x_1 = _stream(RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, at, T, K, SPLIT, HAS_DELTA, HAS_BIAS)
        x_2 = _stream(
            RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, at + 4, T, K, SPLIT, HAS_DELTA, HAS_BIAS
        )
    rstd = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    y = _scaled(x, rstd, w)
    OUT += row.to(tl.int64) * K
    if KEEP:
        RESIDUAL_OUT += row.to(tl.int64) * K
    if PLANES:
        y_1 = _scaled(x_1, rstd, w_1)
        y_2 = _scaled(x_2, rstd, w_2)
        tl.store(OUT + at, y_1, mask=at < K)
        tl.store(OUT + at + 4, y_2, mask=at + 4 < K)
        if KEEP:
            tl.store(RESIDUAL_OUT + at, x_1.to(RESIDUAL_OUT.dtype.element_ty), mask=at < K)
            tl.store(RESIDUAL_OUT + at + 4, x_2.to(RESIDUAL_OUT.dtype.element_ty), mask=at + 4 < K)
        store_row(
            y.to(tl.float32), y_1.to(tl.float32), y_2.to(tl.float32), WORDS, SCALE, SUM, FLOATS, TABLE_ROW, row, part,
            words_stride, scale_stride, MEMBERS, COLUMNS, (K + 255) // 256, KP, KS,
        )  # fmt: skip
    else:
        tl.store(OUT + k, y, mask=k < K)
        if KEEP:
            tl.store(RESIDUAL_OUT + k, x.to(RESIDUAL_OUT.dtype.element_ty), mask=k < K)
