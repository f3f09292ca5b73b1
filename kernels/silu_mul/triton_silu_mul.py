"""The kernel behind `device.silu_mul`."""

# What a constant decides is no branch:
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.planes import sum_partials
from kernels.rows import vector_pointer


@triton.jit(do_not_specialize=["T"])
def silu_mul_kernel(
    BASE, DELTA, SLAB, STARTS, ENTRY, OUT, T, bias,
    INNER: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part): WIDTH columns.

    Args:
        bias: where gate's and up's begin in each entry's block of vectors.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    entry = tl.load(ENTRY + row)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = k < INNER
    if HAS_BIAS:
        BIAS = vector_pointer(SLAB, STARTS, entry, bias) + k
        of_gate = tl.load(BIAS, mask=mask, other=0.0).to(tl.float32)
        of_up = tl.load(BIAS + INNER, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    gate = sum_partials(BASE, DELTA, row, k, mask, T, 2 * INNER, entry, SPLIT, HAS_DELTA)
    up = sum_partials(BASE, DELTA, row, INNER + k, mask, T, 2 * INNER, entry, SPLIT, HAS_DELTA)
    if HAS_BIAS:
        gate += of_gate
        up += of_up
    root = tl.rsqrt(1.0 + tl.exp(-gate))  # of the sigmoid: half the instructions of a division
    tl.store(OUT + row.to(tl.int64) * INNER + k, (gate * root * root * up).to(OUT.dtype.element_ty), mask=mask)
