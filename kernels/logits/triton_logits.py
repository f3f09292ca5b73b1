"""The kernel behind `device.logits`."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.planes import sum_partials


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    BASE, DELTA, ENTRY, VOCAB, OUT, T, V, WIDTH: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, slice of WIDTH columns)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    entry = tl.load(ENTRY + row)
    own = tl.load(VOCAB + entry)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = sum_partials(BASE, DELTA, row, cols, cols < V, T, V, entry, SPLIT, HAS_DELTA)
    total = tl.where(cols < own, total, float("-inf"))
    tl.store(OUT + row.to(tl.int64) * V + cols, total, mask=cols < V)
