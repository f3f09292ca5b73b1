"""Replaced and added rows of a variant's head: their outputs are products with the variant's own rows alone.

Grid: [row blocks, segments]; a program goes on to further blocks where a variant has more.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import ROW_INDEX, ROW_VALUE
from kernels.device import DeviceDeltas, Partials, Target

BLOCKS = 32
"""Programs of one segment: few, as most variants replace few rows, and enough for those that replace many."""


@triton.jit(do_not_specialize=["T"])
def rows_kernel(
    X, x_stride, SLAB, TABLE, table_stride, SEGMENTS, BASE, DELTA, T, N,
    K: tl.constexpr, SPLIT: tl.constexpr, BLOCKS: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """DELTA[t, index[r]] = x[t] value[r]^T; BASE[., t, index[r]] = 0."""
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    rows = tl.load(TABLE + entry * table_stride + parts.ROWS)
    if (stop <= start) | (rows == 0):
        return
    index = parts.part(SLAB, TABLE, entry * table_stride, ROW_INDEX, tl.int32)
    value = parts.part(SLAB, TABLE, entry * table_stride, ROW_VALUE, X.dtype.element_ty)
    for r0 in range(tl.program_id(0) * BR, rows, BLOCKS * BR):
        r = r0 + tl.arange(0, BR)
        column = tl.load(index + r, mask=r < rows, other=0)
        for t0 in range(start, stop, BT):
            t = t0 + tl.arange(0, BT)
            total = parts.rows_times_matrix(X, x_stride, value, t, stop, r, rows, 0, K, K, BK, STAGES)
            at = t[:, None].to(tl.int64) * N + column[None, :]
            mask = (t[:, None] < stop) & (r[None, :] < rows)
            tl.store(DELTA + at, total, mask=mask)
            for s in tl.static_range(SPLIT):
                at = (s * T + t)[:, None].to(tl.int64) * N + column[None, :]
                tl.store(BASE + at, tl.zeros_like(total).to(BASE.dtype.element_ty), mask=mask)


def replace_rows(
    x_LK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, out: Partials
) -> None:
    """In place: the columns of out that a variant's own rows replace or add. To be called after all else is in `out`.

    Args:
        out: contiguous, as wide as the widest variant.
    """
    parts.check_rows(x_LK, target)
    base, delta = out.base_STN, out.delta_TN
    assert delta is not None, "rows are replaced in delta"
    assert base.is_contiguous()
    assert delta.is_contiguous()
    assert base.shape[1:] == delta.shape, f"partials {list(base.shape)} and {list(delta.shape)}"
    rows = x_LK.shape[0]
    rows_kernel[(BLOCKS, segments_G4.shape[0])](
        x_LK, x_LK.stride(0), *parts.table_arguments(deltas, target), segments_G4, base, delta, rows, base.shape[2],
        K=target.inputs, SPLIT=base.shape[0], BLOCKS=BLOCKS, BT=16 if rows <= 32 else 32, BR=16, BK=256, STAGES=4,
        num_warps=2,
    )  # fmt: skip
