"""Prefill of segments of many variants, every way through the linear, against float64."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.delta_linear import gluon_product, row_tiles, table_reference, triton_merge, triton_parts, wide
from kernels.device import Kinds, Target
from tests.kernels.device_harness import DEVICE, DTYPES, ENTRIES, POISON, Spec, World, poisoned, world

FUSED = Target(1, 48, 72, (0, 16, 32))
SINGLE = Target(0, 40, 264)
SPECS: list[Spec] = [*ENTRIES.values(), {"rank": 16, "members": (1,)}, {"quant": 2}]
QUANT = len(SPECS)
IMPLS = [impl for impl in get_args(wide.Impl) if impl != "specialised"]
GPU = DEVICE.type == "cuda"
HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
COUNTS: dict[str, dict[int, int]] = {
    "one": {1: 3},
    "base": {0: 5},
    "every entry": dict.fromkeys(range(QUANT + 1), 1),
    "uneven": {0: 17, 2: 1, 4: 20},
}
"""Rows of each entry"""
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("impl", [*IMPLS, None])
def test_mixes(impl: wide.Impl | None, counts: str) -> None:
    check(world([SINGLE, FUSED], SPECS, torch.float16), FUSED, COUNTS[counts], impl)


@pytest.mark.parametrize("impl", ["merge", "split", "fused"])
@pytest.mark.parametrize("target", [SINGLE, Target(0, 17, 300), Target(1, 144, 8, (0, 16, 128))], ids=str)
def test_sizes(target: Target, impl: wide.Impl) -> None:
    w = world([SINGLE, target] if target.index else [target, FUSED], SPECS, DTYPES[0], seed=1)
    check(w, target, {0: 1, 4: 3, 9: 2}, impl)


@pytest.mark.parametrize("impl", ["merge", "split", "fused"])
@pytest.mark.parametrize("spec", [{"rank": 40}, {"dense": True}, {"quant": 4}, {"signs": 2, "col": True}], ids=str)
def test_one_kind(spec: Spec, impl: wide.Impl) -> None:
    check(world([SINGLE], [spec, {}], torch.float16, seed=9), SINGLE, {0: 1, 1: 5, 2: 1}, impl)


@pytest.mark.parametrize("impl", ["split", "fused"])
def test_signs_alone(impl: wide.Impl) -> None:
    """The form in which signs are added two columns at a time, on a GPU."""
    for dtype in DTYPES:
        w = world([SINGLE], [{"signs": 1}, {}, {"signs": 1}], dtype, seed=2)
        check(w, SINGLE, {0: 3, 1: 40, 2: 4, 3: 9}, impl)


@pytest.mark.parametrize(
    "overlap", [False, pytest.param(True, marks=pytest.mark.skipif(not GPU, reason="needs a GPU"))]
)
def test_merges_in_slices(overlap: bool) -> None:
    target = Target(0, 144, 72)
    w = world([target], [{"signs": 1}, {"rank": 8}], DTYPES[1], seed=10)
    way = wide.Way("merge", slice_bytes=64 * 72 * DTYPES[1].itemsize, overlap=overlap)
    prefill(w, target, [(1, 0, 9), (2, 9, 12)], None, way)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("target", [Target(0, 128, 64), Target(0, 4096, 1024), Target(0, 1000, 448)], ids=str)
def test_specialised(target: Target) -> None:
    for dtype in DTYPES:
        w = world([target], [{"signs": 1}, {}, {"signs": 1}, {"signs": 1}], dtype, seed=7)
        check(w, target, {0: 300, 1: 700, 2: 4, 3: 256, 4: 1}, "specialised")
        check(w, target, {4: 3}, "specialised")


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", row_tiles.SIZES)
def test_specialised_in_every_size_of_tiles(rows: int) -> None:
    target = Target(0, 520, 192)
    w = world([target], [{"signs": 1}, {}, {"signs": 1}, {"signs": 1}], DTYPES[0], seed=11)
    ends = list(itertools.accumulate((70, 2 * rows + 1, rows, 3, rows - 1), initial=0))
    segments = [(entry, *span) for entry, span in enumerate(itertools.pairwise(ends))]
    prefill(w, target, segments, None, wide.Way("specialised", rows=rows))


def test_a_segment_of_several_tiles() -> None:
    w = world([SINGLE], [{"signs": 1}, {"signs": 1}], torch.float32, seed=3)
    check(w, SINGLE, {0: 1, 1: wide.ROWS + 9, 2: 3}, "fused")


def test_segments_in_any_order_of_entries() -> None:
    w = world([SINGLE], [{"signs": 1}, {"dense": True}], torch.float32, seed=4)
    for impl in ("split", "fused"):
        prefill(w, SINGLE, [(2, 0, 3), (0, 3, 5), (1, 5, 6), (2, 6, 9), (0, 9, 11)], impl)


def test_follows_the_table() -> None:
    """A slot's parts are those that its row names, wherever in the slab they lie."""
    w = world([SINGLE, FUSED], SPECS, DTYPES[0], seed=5)
    w.deltas.table_EJF[1] = w.deltas.table_EJF[6].clone()
    for impl in IMPLS:
        check(w, FUSED, {1: 2, 2: 1}, impl)


def test_merge_in_slices_rounds_once() -> None:
    dtype = DTYPES[1]
    w = world([SINGLE, FUSED], SPECS, dtype, seed=6)
    weight = (torch.randn(48, 72, device=DEVICE) * 0.05).to(dtype)
    for entry in (0, 4, 9, QUANT):
        exact = weight.double() + table_reference.matrix(w.deltas, FUSED, entry, dtype).double()
        for first, last in ((0, 32), (32, 48)):
            out = poisoned((last - first, 72), dtype)
            triton_merge.merge(weight, FUSED, w.deltas, entry, w.kinds(), out, rows=(first, last))
            slack = 4 * 2.0**-24 * (weight.abs().double() + 1)  # of the sums in float32
            limit = UNIT_ROUNDOFF[dtype] * exact.abs() + slack
            assert ((out - exact[first:last]).abs() <= limit[first:last]).all()


def test_merged_weights_cost_what_rounding_outputs_costs() -> None:
    """And less than rounding the base's output and the sum, as a product in two parts does."""
    dtype, target = DTYPES[1], Target(0, 64, 256)
    w = world([target], [{"signs": 1}], dtype, seed=8)
    weight = (torch.randn(64, 256, device=DEVICE) * 0.05).to(dtype)
    merged = poisoned((64, 256), dtype)
    triton_merge.merge(weight, target, w.deltas, 1, w.kinds(), merged)
    x = torch.randn(512, 256, device=DEVICE).to(dtype).double()
    d = table_reference.matrix(w.deltas, target, 1, dtype).double()
    exact, base = x @ (weight.double() + d).T, x @ weight.double().T
    rounding = (exact.to(dtype) - exact).norm()
    in_two = ((base.to(dtype).double() + x @ d.T).to(dtype) - exact).norm()
    assert (x @ merged.double().T - exact).norm() < 1.3 * rounding
    assert ((x @ merged.double().T).to(dtype) - exact).norm() < 1.2 * in_two


def test_plan_keeps_neighbours_together() -> None:
    many = wide.MERGE_ROWS
    segments = [(0, 0, 900), (1, 900, 910), (2, 910, 910 + many), (3, 910 + many, 915 + many)]
    first, second, third = wide.plan(segments)
    assert (first.impl, first.rows, first.tiles[wide.ROWS]) == ("split", slice(0, 910), slice(0, 5))
    assert (second.impl, second.segments) == ("merge", (segments[2],))
    assert (third.impl, third.tiles[wide.ROWS]) == ("split", slice(7, 8))
    assert [run.impl for run in wide.plan(segments, "merge")] == ["merge"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 900)), min_size=1, max_size=6), st.data())
def test_runs_know_their_tiles_of_every_size(lengths: list[tuple[int, int]], data: st.DataObject) -> None:
    ends = list(itertools.accumulate(length for _, length in lengths))
    segments = [(entry, end - length, end) for (entry, length), end in zip(lengths, ends, strict=True)]
    tiles = row_tiles.row_tiles(segments)
    assert len(tiles) <= row_tiles.most_row_tiles(ends[-1], len(segments))
    impl = data.draw(st.sampled_from([None, "specialised"]))
    for run in wide.plan(segments, impl, many=32, long="specialised", short="fused"):
        for size, own in run.tiles.items():
            assert tiles[own] == row_tiles.cut(run.segments, size)
            assert all(0 < stop - start <= size for _, start, stop, _ in tiles[own])


def test_sizes_of_row_tiles_follow_segments_and_the_chip() -> None:
    def chosen(outputs: int, lengths: Sequence[int]) -> int:
        counts = {size: sum(-(-n // size) for n in lengths) for size in row_tiles.SIZES}
        return gluon_product.tile_rows(Target(0, outputs, 4096), counts, 132)

    assert [chosen(12288, [length] * 16) for length in (256, 128, 64)] == [256, 128, 64]
    assert chosen(4096, [512]) == 128, "which leaves no multiprocessor idle"
    assert chosen(12288, [2048]) == 256


def test_measured_ways_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    target, kinds = Target(0, 4096, 4096), Kinds(signs=True)
    for way in wide.candidates(target, kinds, 300):
        stored = {wide.key(target, kinds): json.loads(json.dumps(asdict(way)))}
        monkeypatch.setattr(triton_parts, "measured", lambda key, device, stored=stored: stored.get(key))
        assert wide.choose(target, kinds, DEVICE) == way
        assert wide.choose(target, Kinds(signs=True, dense=True), DEVICE) == wide.Way()


def check(w: World, target: Target, counts: dict[int, int], impl: wide.Impl | None) -> None:
    segments, at = [], 0
    for entry, count in counts.items():
        segments.append((entry, at, at := at + count))
    prefill(w, target, segments, impl)


def prefill(
    w: World,
    target: Target,
    segments: list[tuple[int, int, int]],
    impl: wide.Impl | None,
    way: wide.Way | None = None,
) -> None:
    rows, kinds = segments[-1][2], w.kinds()
    x = torch.randn(rows, target.inputs, device=DEVICE).to(w.dtype)
    weight = (torch.randn(target.outputs, target.inputs, device=DEVICE) * 0.05).to(w.dtype)
    out = poisoned((rows, target.outputs), w.dtype)
    space = wide.workspace_bytes(target, rows, kinds, w.dtype)
    workspace = torch.full((space,), POISON, dtype=torch.uint8, device=DEVICE)
    tiles = torch.tensor(row_tiles.row_tiles(segments), dtype=torch.int32, device=DEVICE)
    wide.prefill_linear(x, weight, target, w.deltas, tiles, segments, kinds, out, workspace, impl=impl, way=way)
    for entry, start, stop in segments:
        d = table_reference.matrix(w.deltas, target, entry, w.dtype).double()
        want = x[start:stop].double() @ (weight.double() + d).T
        error = (out[start:stop] - want).abs()
        assert (error <= bound(x[start:stop], weight, d, want, w.dtype)).all(), f"entry {entry}: {error.max()}"


def bound(
    x: torch.Tensor, weight: torch.Tensor, d: torch.Tensor, want: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Whatever the way: an output is rounded twice; a weight, a scale, D or x A^T once each."""
    rounded = x.abs().double() @ (weight.abs().double() + 3 * d.abs()).T
    return UNIT_ROUNDOFF[dtype] * (3 * want.abs() + 1.1 * rounded) + 1e-5
