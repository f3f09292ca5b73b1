"""The kernel behind `device.add_norm`."""

# Triton's language is not Python's types:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.device import FIELDS
from kernels.planes import quantize, store_planes, sum_partials
from kernels.rows import column_sets, columns_at, store_statistics, vector_pointer

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
    KS: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part): the whole row in registers; EACH slices of its planes; the first writes all else.

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
    if PDL:
        gdc_wait()
    x = _stream(RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, k, T, K, SPLIT, HAS_DELTA, HAS_BIAS)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    y = _scaled(x, rstd, w)
    if part == 0:
        tl.store(OUT + row.to(tl.int64) * K + k, y, mask=k < K)
        if KEEP:
            tl.store(RESIDUAL_OUT + row.to(tl.int64) * K + k, x.to(RESIDUAL_OUT.dtype.element_ty), mask=k < K)
    if PLANES:
        whole = y.to(tl.float32)
        blocks: tl.constexpr = (K + 255) // 256
        TABLE_ROW = TABLE + (entry * targets + target) * _FIELDS
        for c in range(column_sets(TABLE_ROW, MEMBERS, COLUMNS)):
            scaled = whole * columns_at(FLOATS, TABLE_ROW, c, k, blocks, COLUMNS)
            amax = tl.max(tl.abs(scaled), 0)
            if part == 0:
                total = tl.sum(quantize(scaled, amax), 0)
                store_statistics(SCALE + c * scale_stride + row, SUM + c * scale_stride + row, amax, total)
            for which in range(part * EACH, part * EACH + EACH):
                at = which * KS + tl.arange(0, KS)
                own_w = tl.load(WEIGHT + at, mask=at < K, other=0.0)
                own_x = _stream(
                    RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, at, T, K, SPLIT, HAS_DELTA, HAS_BIAS
                )
                own = _scaled(own_x, rstd, own_w).to(tl.float32)
                q = quantize(own * columns_at(FLOATS, TABLE_ROW, c, at, blocks, COLUMNS), amax)
                store_planes(q, WORDS + c * words_stride, row * blocks * 128, which * (KS // 256), blocks, KS)
