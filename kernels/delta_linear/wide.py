"""The delta linear beside decode-sized sign planes: prefill, and low-rank, dense and replaced-row parts of any size.

Prefill knows its segments on the host and may launch as it likes. Ways through one linear:

- merge: W + D of a variant is written to scratch, a slice of outputs at a time, and multiplied by cuBLAS. Its cost does
  not depend on the rows: for segments of many rows.
- split: cuBLAS multiplies all rows with W, then one launch adds x D^T for every variant. Its cost grows with the rows
  (D costs as many multiply-adds as W): for many segments of few rows.
- fused: one launch, W + D made in registers.
- specialised: the same on Hopper for signs of one plane alone, its loads, sums and products by warps of their own.

Merged and fused weights are rounded to the compute dtype: an output is off by about as much as rounding that output
itself costs (WIDE.md). Split rounds D alone, or nothing (one plane of signs).

Kept values (`kernels.kept`) are only ever merged, whatever the number of rows. Low-rank factors of bytes are added to
what these ways leave, by `low_rank`: once more through the outputs, rounded once more.

Not covered: replaced rows and larger vocabularies, which embeddings and heads have and prefill does not multiply with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from kernels.delta_linear import (
    gluon_product,
    low_rank_choice,
    table_reference,
    triton_merge,
    triton_parts,
    triton_product,
)
from kernels.delta_linear.choice import multiprocessors
from kernels.delta_linear.row_tiles import ROWS, SIZES, Rows, count, cut, spans, starts
from kernels.delta_linear.triton_dense import dense
from kernels.delta_linear.triton_low_rank import low_rank
from kernels.delta_linear.triton_merge import MergeConfig, merge
from kernels.delta_linear.triton_product import ProductConfig
from kernels.delta_linear.triton_rows import replace_rows
from kernels.device import DeviceDeltas, Kinds, Target

__all__ = [
    "ROWS",
    "Run",
    "Way",
    "candidates",
    "choose",
    "dense",
    "low_rank",
    "merge",
    "merged_linear",
    "plan",
    "prefill_linear",
    "replace_rows",
    "workspace_bytes",
]

Impl = Literal["fused", "merge", "specialised", "split", "reference"]
MERGE_ROWS = 384
"""Rows from which writing W + D (4.1 bytes a weight) costs less than multiplying x with D too."""
SPECIALISED_ROWS = 32
"""Of any segment, for that to be faster than fused, where a chip and deltas allow it, as it was for every mix measured
on an H200: of 16 variants 1.5 times the base product against 3.0 at 128 rows each, 2.5 against 3.4 at 64, 4.6 against
5.1 at 32. Shorter segments alone were not tried; beside longer ones a launch of their own would cost more."""
SLICE_BYTES = 2**28
"""Of W + D at a time, where nothing was measured: all of it. Less is still cached when it is multiplied with, but
products of fewer outputs fill a GPU less well."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a prefill's linears are computed. Only their speed and rounding differ; any works for any shape."""

    impl: Impl | None = None
    """Of every segment; None: by rows, see `plan` and `prefill_linear`"""
    merge_rows: int = MERGE_ROWS
    slice_bytes: int = SLICE_BYTES
    """Of scratch that merging uses"""
    overlap: bool = False
    """Merge on a stream of its own, half of the slice_bytes at a time"""
    merge: MergeConfig | None = None
    product: ProductConfig | None = None
    """None: by rule"""
    rows: int | None = None
    """Of specialised's tiles, one of SIZES; None: by rule"""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring segments that are computed in one way."""

    impl: Impl
    segments: tuple[Rows, ...]
    tiles: Mapping[int, slice]
    """Theirs among the row tiles, by size"""

    @property
    def rows(self) -> slice:
        return slice(self.segments[0][1], self.segments[-1][2])


def plan(
    segments: Sequence[Rows],
    impl: Impl | None = None,
    *,
    many: int = MERGE_ROWS,
    long: Impl = "merge",
    short: Impl = "split",
) -> list[Run]:
    """Which segments are computed together and how: `impl`, or `long` those of `many` rows or more and `short` the
    others. The base's rows are cuBLAS's, which is split with nothing to add."""
    runs: list[Run] = []
    tiles = starts(segments)
    for segment in segments:
        entry, start, stop = segment
        assert stop > start, f"empty segment {segment}"
        way = impl or ("split" if entry == 0 else long if stop - start >= many else short)
        own = {size: slice(at, at + count(segment, size)) for size, at in tiles.items()}
        tiles = {size: found.stop for size, found in own.items()}
        if runs and runs[-1].impl == way and runs[-1].rows.stop == start:
            last = runs.pop()
            joined = {size: slice(found.start, own[size].stop) for size, found in last.tiles.items()}
            runs.append(Run(way, (*last.segments, segment), joined))
        else:
            runs.append(Run(way, (segment,), own))
    return runs


def key(target: Target, kinds: Kinds) -> str:
    """What measured ways are filed under."""
    simple = kinds.planes == 1 and not (kinds.columns or kinds.dense or kinds.rank)
    return f"prefill {target.outputs}x{target.inputs} {'signs' if simple else 'mixed'}"


def choose(target: Target, kinds: Kinds, device: torch.device) -> Way:
    """What was measured on this device for this shape, else the rule."""
    found = triton_parts.measured(key(target, kinds), device)
    if found is None:
        return Way()
    merge_config, product_config = found.get("merge"), found.get("product")
    return Way(
        found.get("impl"),
        found.get("merge_rows", MERGE_ROWS),
        found.get("slice_bytes", SLICE_BYTES),
        found.get("overlap", False),
        MergeConfig(**merge_config) if merge_config else None,
        ProductConfig(**product_config) if product_config else None,
        found.get("rows"),
    )


def candidates(target: Target, kinds: Kinds, rows: int) -> list[Way]:
    """For a benchmark's sweep over segments of this many rows; `dataclasses.asdict` of the best is what `choose`
    reads. specialised asserts what it cannot do."""
    whole = target.outputs * target.inputs * 2
    slices = [whole, *(size for size in (2**23, 2**24, 2**25) if size < whole)]
    ways = [Way("merge", slice_bytes=whole, merge=config) for config in triton_merge.candidates(target, kinds)]
    ways += [Way("merge", slice_bytes=size, overlap=overlap) for size in slices for overlap in (False, True)]
    ways += [Way(impl, product=c) for impl in ("fused", "split") for c in triton_product.candidates(rows)]
    return [*ways, *(Way("specialised", rows=size) for size in SIZES)]


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
    way: Way | None = None,
) -> None:
    """out = x (W + D)^T in the compute dtype, for the rows of every segment; the base's are segments of entry 0.

    Args:
        tiles_I4: `row_tiles.row_tiles(segments)` on the device.
        workspace: uint8, aligned to 256, at least `workspace_bytes`.
        impl: instead of the way's.
        way: None: what `choose` finds.
    """
    byte_rank, kinds = kinds.byte_rank, replace(kinds, byte_rank=0)
    way = way or choose(target, kinds, x_TK.device)
    impl = impl or way.impl
    for run in _runs(x_TK, weight_NK, target, kinds, segments, impl, way.merge_rows):
        match run.impl:
            case "merge":
                scratch = workspace[: max(way.slice_bytes, 32 * weight_NK[0].nbytes)]
                for segment in run.segments:
                    _merged(x_TK, weight_NK, target, deltas, segment, kinds, out_TN, scratch, way)
            case "split":
                torch.mm(x_TK[run.rows], weight_NK.T, out=out_TN[run.rows])
                if kinds != Kinds() and any(entry > 0 for entry, _, _ in run.segments):
                    _product(x_TK, None, target, deltas, tiles_I4, run, kinds, out_TN, workspace, way)
            case "fused":
                _product(x_TK, weight_NK, target, deltas, tiles_I4, run, kinds, out_TN, workspace, way)
            case "specialised":
                assert gluon_product.supports(x_TK, weight_NK, target, kinds), "not for these deltas, shapes or device"
                _specialised(x_TK, weight_NK, target, deltas, tiles_I4, run, out_TN, way.rows)
            case "reference":
                for segment in run.segments:
                    _reference(x_TK, weight_NK, target, deltas, segment, out_TN)
    if byte_rank and impl != "reference":
        _byte_factors(x_TK, target, deltas, tiles_I4, segments, byte_rank, out_TN, workspace)


def _runs(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    kinds: Kinds,
    segments: Sequence[Rows],
    impl: Impl | None,
    merge_rows: int,
) -> list[Run]:
    if kinds.compact:  # products know nothing of kept values
        return plan(segments, "reference" if impl == "reference" else "merge")
    if gluon_product.supports(x_TK, weight_NK, target, kinds):
        way: Impl = "specialised" if any(e and stop - at >= SPECIALISED_ROWS for e, at, stop in segments) else "fused"
        return plan(segments, impl, long=way, short=way)
    # Low-rank parts alone cost less than merging them.
    return plan(segments, impl, many=merge_rows if kinds.signs or kinds.dense else x_TK.shape[0] + 1)


def merged_linear(
    x_RK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    entry: int,
    kinds: Kinds,
    out_RN: torch.Tensor,
    scratch: torch.Tensor,
    *,
    config: MergeConfig | None = None,
    side: torch.cuda.Stream | None = None,
) -> None:
    """out = x (W + D)^T for rows of one variant, through as much of W + D at a time as the scratch holds.

    Args:
        scratch: uint8, aligned to 256, at least 16 rows of W, with `side` 32.
        side: a stream on which the next slice is merged while the last one is multiplied with, in the other half of
            the scratch.
    """
    halves = 1 if side is None else 2
    row_bytes = target.inputs * weight_NK.itemsize
    step = scratch.numel() // (halves * row_bytes)
    step = target.outputs if step >= target.outputs else step // 16 * 16
    assert step > 0, f"scratch of {scratch.numel()} bytes for {target.inputs} inputs"
    merged_hSK = scratch[: halves * step * row_bytes].view(weight_NK.dtype).view(halves, step, -1)
    spans = [(first, min(first + step, target.outputs)) for first in range(0, target.outputs, step)]
    parts = [merged_hSK[i % halves, : last - first] for i, (first, last) in enumerate(spans)]
    if side is None:
        for (first, last), part_SK in zip(spans, parts, strict=True):
            merge(weight_NK, target, deltas, entry, kinds, part_SK, rows=(first, last), config=config)
            torch.mm(x_RK, part_SK.T, out=out_RN[:, first:last])
        return
    here = torch.cuda.current_stream(x_RK.device)
    free = [here.record_event()] * halves
    for i, ((first, last), part_SK) in enumerate(zip(spans, parts, strict=True)):
        with torch.cuda.stream(side):
            side.wait_event(free[i % halves])
            merge(weight_NK, target, deltas, entry, kinds, part_SK, rows=(first, last), config=config)
            here.wait_event(side.record_event())
        torch.mm(x_RK, part_SK.T, out=out_RN[:, first:last])
        free[i % halves] = here.record_event()


@lru_cache(maxsize=8)
def _side(device: torch.device) -> torch.cuda.Stream:
    """Of high priority: its programs go first wherever a product leaves room."""
    return torch.cuda.Stream(device, priority=-1)


def workspace_bytes(target: Target, rows: int, kinds: Kinds, dtype: torch.dtype) -> int:
    """For `low_rank` and `prefill_linear` with this many rows."""
    least, whole = 32 * target.inputs * dtype.itemsize, target.outputs * target.inputs * dtype.itemsize
    small = 4 * low_rank_choice.workspace_floats(target, rows, kinds.rank, kinds.byte_rank)
    return max(min(SLICE_BYTES, whole), least, small)


def _byte_factors(
    x_TK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    tiles_I4: torch.Tensor,
    segments: Sequence[Rows],
    byte_rank: int,
    out_TN: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """Adds them, to as many rows at a time as the workspace holds x A^T of."""
    for tiles, span in spans(cut(segments, ROWS), low_rank_choice.BYTE_ROWS):
        longest = min(ROWS, max(stop - start for _, start, stop in segments))
        low_rank(
            x_TK, target, deltas, tiles_I4[tiles], 0, out_TN, workspace, byte_rank=byte_rank, longest=longest, span=span
        )


def _merged(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    segment: Rows,
    kinds: Kinds,
    out_TN: torch.Tensor,
    scratch: torch.Tensor,
    way: Way,
) -> None:
    entry, start, stop = segment
    if entry == 0:
        torch.mm(x_TK[start:stop], weight_NK.T, out=out_TN[start:stop])
    else:
        rows, side = slice(start, stop), _side(x_TK.device) if way.overlap else None
        merged_linear(
            x_TK[rows], weight_NK, target, deltas, entry, kinds, out_TN[rows], scratch, config=way.merge, side=side
        )


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
    way: Way,
) -> None:
    longest = max(stop - start for _, start, stop in run.segments)
    config = way.product or triton_product.choose(min(longest, ROWS), kinds, x_TK.dtype, x_TK.device)
    triton_product.product(
        x_TK, weight_NK, target, deltas, tiles_I4[run.tiles[ROWS]], kinds, out_TN, workspace, config=config
    )


def _specialised(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    target: Target,
    deltas: DeviceDeltas,
    tiles_I4: torch.Tensor,
    run: Run,
    out_TN: torch.Tensor,
    rows: int | None,
) -> None:
    programs = multiprocessors(x_TK.device)
    counts = {size: tiles.stop - tiles.start for size, tiles in run.tiles.items()}
    size = rows or gluon_product.tile_rows(target, counts, programs)
    tiles = tiles_I4[run.tiles[size]]
    gluon_product.product(x_TK, weight_NK, target, deltas, tiles, out_TN, rows=size, programs=programs)


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
