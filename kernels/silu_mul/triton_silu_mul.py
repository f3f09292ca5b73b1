"""The kernel behind `device.silu_mul`."""

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
    root = tl.rsqrt(1.0 + tl.exp(-gate))  # of the sigmoid: half the instructions of a division
    return (gate * root * root * up).to(dtype)


@triton.jit(do_not_specialize=["T", "target", "targets", "scale_stride"])
def silu_mul_kernel(
    BASE, DELTA, SLAB, STARTS, ENTRY, OUT, WORDS, SCALE, SUM, FLOATS, TABLE,
    T, bias, target, targets, words_stride, scale_stride,
    INNER: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLANES: tl.constexpr, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, KS: tl.constexpr,
    EACH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part): one slice of the row; with PLANES EACH of them, and the whole row for its statistics.

    Args:
        bias: where gate's and up's begin in each entry's block of vectors.
        CHUNK, CHUNKS: the tiles that the whole row is in: less padding than one.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    part = tl.program_id(1)
    entry = tl.load(ENTRY + row)
    dtype: tl.constexpr = OUT.dtype.element_ty
    BIAS = vector_pointer(SLAB, STARTS, entry, bias)
    if PDL:
        gdc_wait()
    if not PLANES:
        at = part * KS + tl.arange(0, KS)
        own = _activated(BASE, DELTA, BIAS, row, entry, at, T, dtype, INNER, SPLIT, HAS_DELTA, HAS_BIAS)
        tl.store(OUT + row.to(tl.int64) * INNER + at, own, mask=at < INNER)
    else:
        k = tl.arange(0, CHUNK)
        chunks = ()
        for i in tl.static_range(CHUNKS):
            y = _activated(BASE, DELTA, BIAS, row, entry, i * CHUNK + k, T, dtype, INNER, SPLIT, HAS_DELTA, HAS_BIAS)
            chunks = chunks + (y,)
        blocks: tl.constexpr = (INNER + 255) // 256
        TABLE_ROW = TABLE + (entry * targets + target) * _FIELDS
        for c in range(column_sets(TABLE_ROW, MEMBERS, COLUMNS)):
            peak = tl.zeros((CHUNK,), tl.float32)
            for i in tl.static_range(CHUNKS):
                x = chunks[i].to(tl.float32) * columns_at(FLOATS, TABLE_ROW, c, i * CHUNK + k, blocks, COLUMNS)
                peak = tl.maximum(peak, tl.abs(x))
            amax = tl.max(peak, 0)
            if part == 0:
                total = tl.zeros((CHUNK,), tl.int32)
                for i in tl.static_range(CHUNKS):
                    x = chunks[i].to(tl.float32) * columns_at(FLOATS, TABLE_ROW, c, i * CHUNK + k, blocks, COLUMNS)
                    total += quantize(x, amax)
                store_statistics(SCALE + c * scale_stride + row, SUM + c * scale_stride + row, amax, tl.sum(total, 0))
            for which in range(part * EACH, part * EACH + EACH):
                at = which * KS + tl.arange(0, KS)
                own = _activated(BASE, DELTA, BIAS, row, entry, at, T, dtype, INNER, SPLIT, HAS_DELTA, HAS_BIAS)
                if c == 0:
                    tl.store(OUT + row.to(tl.int64) * INNER + at, own, mask=at < INNER)
                q = quantize(own.to(tl.float32) * columns_at(FLOATS, TABLE_ROW, c, at, blocks, COLUMNS), amax)
                store_planes(q, WORDS + c * words_stride, row * blocks * 128, which * (KS // 256), blocks, KS)
