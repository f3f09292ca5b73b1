"""The kernel behind `device.add_norm`."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.device import FIELDS
from kernels.planes import store_row, sum_partials
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
def _scaled(x, rstd, WEIGHT, k, K: tl.constexpr):
    """In the compute dtype: rounded before the weight and after it, as transformers does."""
    weight = tl.load(WEIGHT + k, mask=k < K, other=0.0)
    return ((x * rstd).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)


@triton.jit(do_not_specialize=["T", "target", "targets"])
def add_norm_kernel(
    RESIDUAL, BASE, DELTA, SLAB, STARTS, ENTRY, ROWS, RESIDUAL_OUT, OUT, WORDS, SCALE, SUM, FLOATS, TABLE,
    eps, T, weight, bias, target, targets, words_stride, scale_stride,
    K: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, KEEP: tl.constexpr, PLANES: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (row, which): the whole row in registers; slice `which` of its planes; the first writes all else.

    Args:
        weight, bias: where they begin in each entry's block of vectors.
        SPLIT: base partials; 0: nothing is added. KEEP: write RESIDUAL_OUT. HAS_ROWS: of ROWS[row], not of row.
    """
    row = tl.program_id(0)
    which = tl.program_id(1)
    source = row
    if HAS_ROWS:
        source = tl.load(ROWS + row)
    entry = tl.load(ENTRY + source)
    k = tl.arange(0, KP)
    x = _stream(RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, k, T, K, SPLIT, HAS_DELTA, HAS_BIAS)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    WEIGHT = vector_pointer(SLAB, STARTS, entry, weight)
    y = _scaled(x, rstd, WEIGHT, k, K)
    if which == 0:
        tl.store(OUT + row.to(tl.int64) * K + k, y, mask=k < K)
        if KEEP:
            tl.store(RESIDUAL_OUT + row.to(tl.int64) * K + k, x.to(RESIDUAL_OUT.dtype.element_ty), mask=k < K)
    if PLANES:
        whole = y.to(tl.float32)
        part = whole
        if KS < KP:
            k = which * KS + tl.arange(0, KS)
            x = _stream(RESIDUAL, BASE, DELTA, SLAB, STARTS, source, entry, bias, k, T, K, SPLIT, HAS_DELTA, HAS_BIAS)
            part = _scaled(x, rstd, WEIGHT, k, K).to(tl.float32)
        store_row(
            whole, part, WORDS, SCALE, SUM, FLOATS, TABLE + (entry * targets + target) * _FIELDS, row, which,
            words_stride, scale_stride, (K + 255) // 256, MEMBERS, COLUMNS, KP, KS,
        )  # fmt: skip
