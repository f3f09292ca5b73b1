"""Dense deltas of decode-sized segments: delta += x D^T, each D [N, K] read once per `rows` rows of its segment.

Grid: [output tiles, segments]. K is not split: N is cut finely enough to fill a GPU from two segments on.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import DENSE, OUTPUTS
from kernels.device import DeviceDeltas, Target


@triton.jit
def dense_kernel(
    X, x_stride, SLAB, TABLE, table_stride, SEGMENTS, OUT, out_stride, N,
    K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    own = tl.load(TABLE + entry * table_stride + OUTPUTS)
    rows = tl.where(own > 0, own, N)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if (stop <= start) | (tl.program_id(0) * BN >= rows) | (not parts.has(TABLE, entry * table_stride, DENSE)):
        return
    weight = parts.part(SLAB, TABLE, entry * table_stride, DENSE, X.dtype.element_ty)
    for t0 in range(start, stop, BT):
        t = t0 + tl.arange(0, BT)
        total = parts.rows_times_matrix(X, x_stride, weight, t, stop, n, rows, 0, K, K, BK, STAGES)
        at = OUT + t[:, None].to(tl.int64) * out_stride + n[None, :]
        mask = (t[:, None] < stop) & (n[None, :] < rows)
        tl.store(at, total + tl.load(at, mask=mask, other=0.0), mask=mask)


@dataclass(frozen=True, slots=True)
class DenseConfig:
    rows: int
    """Rows of x that share one reading of D"""
    outputs: int = 32
    inner: int = 128
    stages: int = 4
    warps: int = 4


def key(target: Target, rows: int) -> str:
    """What measured configurations are filed under."""
    return f"dense {target.outputs}x{target.inputs} {triton.next_power_of_2(rows)}"


def choose(target: Target, rows: int, device: torch.device) -> DenseConfig:
    """What was measured on this device, else the rule: as many rows as tensor cores multiply while D arrives, and
    small tiles, as N alone must fill a GPU."""
    found = parts.measured(key(target, rows), device)
    if found is not None:
        return DenseConfig(**found)
    return DenseConfig(rows=min(64, max(16, triton.next_power_of_2(rows))))


def candidates(rows: int) -> list[DenseConfig]:
    """For a benchmark's sweep."""
    tall = min(64, max(16, triton.next_power_of_2(rows)))
    return [
        DenseConfig(tall, outputs, inner, stages, warps)
        for outputs, warps in ((16, 2), (32, 4), (64, 4))
        for inner, stages in ((64, 5), (128, 4), (256, 3))
    ]


def dense(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, delta_TN: torch.Tensor,
    *, config: DenseConfig | None = None,
) -> None:  # fmt: skip
    """Adds x D^T of every segment whose variant has a dense part to its rows of delta, which must hold numbers.

    Args:
        delta_TN: float32; at least as wide as the widest variant.
    """
    parts.check_rows(x_TK, target)
    assert delta_TN.stride(1) == 1
    config = config or choose(target, x_TK.shape[0], x_TK.device)
    dense_kernel[(triton.cdiv(delta_TN.shape[1], config.outputs), segments_G4.shape[0])](
        x_TK, x_TK.stride(0), *parts.table_arguments(deltas, target), segments_G4, delta_TN, delta_TN.stride(0),
        target.outputs, K=target.inputs, BT=config.rows, BN=config.outputs, BK=config.inner, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
