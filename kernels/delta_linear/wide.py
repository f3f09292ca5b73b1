"""The delta linear beside decode-sized sign planes: prefill, and low-rank, dense and replaced-row parts of any size.

Prefill knows its segments on the host and may launch as it likes. Ways through one linear:

- merge: W + D of a variant is written to scratch, a slice of outputs at a time, and multiplied by cuBLAS. Its cost does
  not depend on the rows: for segments of many rows.
- split: cuBLAS multiplies all rows with W, then one launch adds x D^T for every variant. Its cost grows with the rows
  (D costs as many multiply-adds as W): for many segments of few rows.
- fused: one launch, W + D made in registers.

Merged and fused weights are rounded to the compute dtype: an output is off by about as much as rounding that output
itself costs (WIDE.md). Split rounds D alone, or nothing (one plane of signs).

Not covered: replaced rows and larger vocabularies, which embeddings and heads have and prefill does not multiply with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.delta_linear import table_reference, triton_low_rank, triton_product
from kernels.delta_linear.triton_dense import dense
from kernels.delta_linear.triton_low_rank import low_rank
from kernels.delta_linear.triton_merge import merge
from kernels.delta_linear.triton_product import ROWS
from kernels.delta_linear.triton_rows import replace_rows
from kernels.device import DeviceDeltas, Kinds, Target

__all__ = [
    "ROWS",
    "Run",
    "dense",
    "low_rank",
    "merge",
    "merged_linear",
    "plan",
    "prefill_linear",
    "replace_rows",
    "row_tiles",
    "workspace_bytes",
]

Impl = Literal["fused", "merge", "split", "reference"]
Rows = tuple[int, int, int]
"""(entry, start, stop)"""
MERGE_ROWS = 384
"""Rows from which writing W + D (4.1 bytes a weight) costs less than multiplying x with D too."""
SLICE_BYTES = 16 * 2**20
"""Of W + D at a time: what the second-level cache still holds when it is multiplied with."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring segments that are computed in one way."""

    impl: Impl
    segments: tuple[Rows, ...]
    tiles: slice
    """Theirs among the row tiles"""

    @property
    def rows(self) -> slice:
        return slice(self.segments[0][1], self.segments[-1][2])


def row_tiles(segments: Sequence[Rows]) -> list[list[int]]:
    """(entry, start, stop, 0) of row tiles, at most ROWS rows and one entry each, in the segments' order."""
    return [
        [entry, first, min(first + ROWS, stop), 0]
        for entry, start, stop in segments
        for first in range(start, stop, ROWS)
    ]


def plan(segments: Sequence[Rows], impl: Impl | None = None) -> list[Run]:
    """Which segments are computed together and how: `impl`, or what the rows of each suggest."""
    runs: list[Run] = []
    at = 0
    for segment in segments:
        entry, start, stop = segment
        assert stop > start, f"empty segment {segment}"
        way = impl or ("merge" if entry > 0 and stop - start >= MERGE_ROWS else "split")
        tiles = slice(at, at := at + -(-(stop - start) // ROWS))
        if runs and runs[-1].impl == way and runs[-1].rows.stop == start:
            last = runs.pop()
            runs.append(Run(way, (*last.segments, segment), slice(last.tiles.start, tiles.stop)))
        else:
            runs.append(Run(way, (segment,), tiles))
    return runs


def prefill_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    tiles_I4: torch.Tensor,
    segments: Sequence[Rows],
    kinds: Kinds,
    out_TN: torch.Tensor,
    workspace: torch.Tensor,
    *,
    impl: Impl | None = None,
) -> None:
    """out = x (W + D)^T in the compute dtype, for the rows of every segment; the base's are segments of entry 0.

    Args:
        tiles_I4: `row_tiles(segments)` on the device.
        workspace: uint8, aligned to 256, at least `workspace_bytes`.
        impl: None: what `plan` makes of the segments.
    """
    for run in plan(segments, impl):
        match run.impl:
            case "merge":
                for segment in run.segments:
                    _merged(x_TK, weight_NK, target, deltas, segment, kinds, out_TN, workspace)
            case "split":
                torch.mm(x_TK[run.rows], weight_NK.T, out=out_TN[run.rows])
                if any(entry > 0 for entry, _, _ in run.segments):
                    _product(x_TK, None, target, deltas, tiles_I4, run, kinds, out_TN, workspace)
            case "fused":
                _product(x_TK, weight_NK, target, deltas, tiles_I4, run, kinds, out_TN, workspace)
            case "reference":
                for segment in run.segments:
                    _reference(x_TK, weight_NK, target, deltas, segment, out_TN)


def merged_linear(
    x_RK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    entry: int,
    kinds: Kinds,
    out_RN: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """out = x (W + D)^T for rows of one variant, through as much of W + D at a time as the scratch holds.

    Args:
        scratch: uint8, aligned to 256, at least 16 rows of W.
    """
    step = scratch.numel() // (target.inputs * weight_NK.itemsize)
    step = target.outputs if step >= target.outputs else step // 16 * 16
    assert step > 0, f"scratch of {scratch.numel()} bytes for {target.inputs} inputs"
    merged_SK = scratch[: step * target.inputs * weight_NK.itemsize].view(weight_NK.dtype).view(step, -1)
    for first in range(0, target.outputs, step):
        last = min(first + step, target.outputs)
        part_SK = merged_SK[: last - first]
        merge(weight_NK, target, deltas, entry, kinds, part_SK, rows=(first, last))
        torch.mm(x_RK, part_SK.T, out=out_RN[:, first:last])


def workspace_bytes(target: Target, rows: int, kinds: Kinds, dtype: torch.dtype) -> int:
    """For `low_rank` and `prefill_linear` with this many rows."""
    merged = max(SLICE_BYTES, 16 * target.inputs * dtype.itemsize)
    small = 4 * triton_low_rank.workspace_floats(target, rows, kinds.rank) if kinds.rank else 0
    return max(min(merged, target.outputs * target.inputs * dtype.itemsize), small)


def _merged(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    segment: Rows,
    kinds: Kinds,
    out_TN: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    entry, start, stop = segment
    if entry == 0:
        torch.mm(x_TK[start:stop], weight_NK.T, out=out_TN[start:stop])
    else:
        merged_linear(x_TK[start:stop], weight_NK, target, deltas, entry, kinds, out_TN[start:stop], workspace)


def _product(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor | None,
    target: Target,
    deltas: DeviceDeltas,
    tiles_I4: torch.Tensor,
    run: Run,
    kinds: Kinds,
    out_TN: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    longest = max(stop - start for _, start, stop in run.segments)
    config = triton_product.choose(min(longest, ROWS), kinds, x_TK.device)
    triton_product.product(
        x_TK, weight_NK, target, deltas, tiles_I4[run.tiles], kinds, out_TN, workspace, config=config
    )


def _reference(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    segment: Rows,
    out_TN: torch.Tensor,
) -> None:
    entry, start, stop = segment
    merged_NK = weight_NK.float() + table_reference.matrix(deltas, target, entry, weight_NK.dtype)
    out_TN[start:stop] = (x_TK[start:stop].float() @ merged_NK.T).to(out_TN.dtype)
