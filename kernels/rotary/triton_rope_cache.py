"""The kernel behind `device.rope_and_cache`."""

# What a constant decides is no branch:
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.planes import sum_partials
from kernels.rows import vector_pointer


@triton.jit
def _normed(x, rstd, weight):
    """Rounded to the compute dtype before the weight, as `rms_norm` is."""
    return (x * rstd).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _either(which, A, B, mask):
    return tl.where(which, tl.load(A, mask=mask, other=0.0), tl.load(B, mask=mask, other=0.0))


@triton.jit
def head_rows(
    BASE, DELTA, SLAB, STARTS, row, entry, head, d, mask, T, bias,
    TOTAL: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """float32, of mask's shape: columns d of heads of q, k and v of a row, with their bias.

    TOTAL: heads of q, k and v together.
    """
    at = head * D + d
    x = sum_partials(BASE, DELTA, row, at, mask, T, TOTAL * D, entry, SPLIT, HAS_DELTA)
    if HAS_BIAS:
        x += tl.load(vector_pointer(SLAB, STARTS, entry, bias) + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def turned_rows(
    BASE, DELTA, SLAB, STARTS, COS, SIN, row, entry, head, d, mask, T, eps, bias, norm,
    TOTAL: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """As `head_rows`, of [heads, columns], normed where the model does and turned. norm: where its weights begin."""
    HALF: tl.constexpr = D // 2
    other = tl.where(d < HALF, d + HALF, d - HALF)
    x = head_rows(BASE, DELTA, SLAB, STARTS, row, entry, head, d, mask, T, bias, TOTAL, D, SPLIT, HAS_DELTA, HAS_BIAS)
    y = head_rows(
        BASE, DELTA, SLAB, STARTS, row, entry, head, other, mask, T, bias, TOTAL, D, SPLIT, HAS_DELTA, HAS_BIAS
    )
    angle = row * HALF + d % HALF
    cos = tl.load(COS + angle, mask=d < D, other=0.0)
    sin = tl.load(SIN + angle, mask=d < D, other=0.0)
    if HAS_NORM:
        WEIGHT = vector_pointer(SLAB, STARTS, entry, norm)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = _normed(x, rstd, tl.load(WEIGHT + d, mask=d < D, other=0.0))
        y = _normed(y, rstd, tl.load(WEIGHT + other, mask=d < D, other=0.0))
    return tl.where(d < HALF, x * cos - y * sin, x * cos + y * sin)


@triton.jit(do_not_specialize=["T"])
def rope_cache_kernel(
    BASE, DELTA, SLAB, STARTS, ENTRY, COS, SIN, SLOTS, eps, bias, q_norm, k_norm, Q, CACHE, T,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, which): heads which * GROUP on of q, k and v, one after another, as two halves [GROUP, WIDTH].

    Args:
        bias, q_norm, k_norm: where they begin in each entry's block of vectors.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    entry = tl.load(ENTRY + row)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    total: tl.constexpr = HEADS + 2 * KV_HEADS
    inside = (head < total) & (i < HALF)
    at = head * (2 * HALF) + i
    slot = tl.load(SLOTS + row).to(tl.int64)
    if HAS_BIAS:
        BIAS = vector_pointer(SLAB, STARTS, entry, bias)
        bias_x = tl.load(BIAS + at, mask=inside, other=0.0).to(tl.float32)
        bias_y = tl.load(BIAS + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        OF_Q = vector_pointer(SLAB, STARTS, entry, q_norm) + i
        OF_K = vector_pointer(SLAB, STARTS, entry, k_norm) + i
        norm_x = _either(head < HEADS, OF_Q, OF_K, i < HALF)
        norm_y = _either(head < HEADS, OF_Q + HALF, OF_K + HALF, i < HALF)
    if PDL:
        gdc_wait()
    cos = tl.load(COS + row * HALF + i, mask=i < HALF, other=0.0)
    sin = tl.load(SIN + row * HALF + i, mask=i < HALF, other=0.0)
    x = sum_partials(BASE, DELTA, row, at, inside, T, total * 2 * HALF, entry, SPLIT, HAS_DELTA)
    y = sum_partials(BASE, DELTA, row, at + HALF, inside, T, total * 2 * HALF, entry, SPLIT, HAS_DELTA)
    if HAS_BIAS:
        x += bias_x
        y += bias_y
    turned = head < HEADS + KV_HEADS
    if HAS_NORM:
        rstd = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF) + eps)[:, None]
        x = tl.where(turned, _normed(x, rstd, norm_x), x)
        y = tl.where(turned, _normed(y, rstd, norm_y), y)
    first = tl.where(turned, x * cos - y * sin, x).to(Q.dtype.element_ty)
    second = tl.where(turned, y * cos + x * sin, y).to(Q.dtype.element_ty)

    to_q = Q + row.to(tl.int64) * (HEADS * 2 * HALF) + at
    tl.store(to_q, first, mask=inside & (head < HEADS))
    tl.store(to_q + HALF, second, mask=inside & (head < HEADS))
    # K's heads and then V's: as they follow one another in the row, so they do in a block.
    place = (slot // BLOCK_SIZE * (2 * KV_HEADS) + (head - HEADS)) * BLOCK_SIZE + slot % BLOCK_SIZE
    to_cache = CACHE + place * (2 * HALF) + i
    tl.store(to_cache, first, mask=inside & (head >= HEADS))
    tl.store(to_cache + HALF, second, mask=inside & (head >= HEADS))
