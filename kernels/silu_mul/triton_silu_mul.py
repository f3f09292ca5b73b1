"""The kernel behind `device.silu_mul`."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.device import FIELDS
from kernels.planes import store_row, sum_partials
from kernels.rows import vector_pointer

_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _activated(
    BASE, DELTA, BIAS, row, entry, k, T, dtype: tl.constexpr,
    INNER: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Columns k of silu(gate) * up, in the compute dtype."""
    mask = k < INNER
    gate = sum_partials(BASE, DELTA, row, k, mask, T, 2 * INNER, entry, SPLIT, HAS_DELTA)
    up = sum_partials(BASE, DELTA, row, INNER + k, mask, T, 2 * INNER, entry, SPLIT, HAS_DELTA)
    if HAS_BIAS:
        gate += tl.load(BIAS + k, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(BIAS + INNER + k, mask=mask, other=0.0).to(tl.float32)
    return (gate * tl.sigmoid(gate) * up).to(dtype)


@triton.jit(do_not_specialize=["T", "target", "targets"])
def silu_mul_kernel(
    BASE, DELTA, SLAB, STARTS, ENTRY, OUT, WORDS, SCALE, SUM, FLOATS, TABLE,
    T, bias, target, targets, words_stride, scale_stride,
    INNER: tl.constexpr, KP: tl.constexpr, KS: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLANES: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (row, which). PLANES: each program has the whole row in registers for its statistics, and writes slice
    `which`. Else it has nothing but its slice.

    Args:
        bias: where gate's and up's begin in each entry's block of vectors.
    """
    row = tl.program_id(0)
    which = tl.program_id(1)
    entry = tl.load(ENTRY + row)
    dtype: tl.constexpr = OUT.dtype.element_ty
    BIAS = vector_pointer(SLAB, STARTS, entry, bias)
    at = which * KS + tl.arange(0, KS)
    part = _activated(BASE, DELTA, BIAS, row, entry, at, T, dtype, INNER, SPLIT, HAS_DELTA, HAS_BIAS)
    tl.store(OUT + row.to(tl.int64) * INNER + at, part, mask=at < INNER)
    if PLANES:
        whole = part
        if KS < KP:
            k = tl.arange(0, KP)
            whole = _activated(BASE, DELTA, BIAS, row, entry, k, T, dtype, INNER, SPLIT, HAS_DELTA, HAS_BIAS)
        store_row(
            whole.to(tl.float32), part.to(tl.float32), WORDS, SCALE, SUM, FLOATS,
            TABLE + (entry * targets + target) * _FIELDS, row, which, words_stride, scale_stride, (INNER + 255) // 256,
            MEMBERS, COLUMNS, KP, KS,
        )  # fmt: skip
