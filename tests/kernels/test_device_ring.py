"""Linears by `gluon_ring` against float64 and, bit for bit, the portable kernels. On a GPU of capability 9 alone:
Triton's interpreter knows no Gluon."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.delta_linear import gluon_ring, gluon_rows
from kernels.delta_linear.choice import Config, choose, ringed
from kernels.delta_linear.device import delta_linear, partials_of
from kernels.delta_linear.ring_check import ring_check
from kernels.device import Kinds, Partials, Planes, Target, segment_table
from kernels.planes import prepare_planes
from tests.kernels.device_harness import DEVICE, Rows, World, rows, world
from tests.kernels.test_device_signs import activations, near, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="needs a GPU of capability 9"
    ),
]
ALONE = Kinds(signs=True, single=True)
RING, STREAM = (ringed(Config(impl), 1, ALONE) for impl in ("flat", "signs"))
SOME, MANY = (ringed(Config("flat"), count, Kinds(signs=True)) for count in (2, 65))
TARGETS = {
    "odd": Target(1, 72, 1104),
    "one block": Target(1, 24, 256),
    "narrow": Target(1, 72, 128),
    "three blocks": Target(1, 72, 600),
    "eight blocks": Target(1, 200, 2048),
    "narrow and long": Target(1, 32768, 200),
    "members": Target(1, 58 * 16, 1032, (0, 16, 48)),
    "spread 2": Target(1, 4096, 5120),
    "spread 4": Target(1, 1032, 11008),
    "longest": Target(1, 304, 16384),
    "7B": Target(1, 12288, 4096, (0, 4096, 8192)),
}
BATCHES = {
    "one": [1],
    "base": [0, 0, 0],
    "distinct": [1, 2, 3, 4, 5, 6, 7, 8],
    "with the base": [4, 0, 0, 2, 9, 0, 1],
    "unsigned": [3],
    "most": [*range(1, 10)] * 3 + [0] * 5,
}
SPECS = [{"signs": 1}, {"signs": 1}, {}, *[{"signs": 1}] * 6]
COLUMNS = [{"signs": 1, "col": True}, {"signs": 1}, {}, *[{"signs": 1, "col": True}] * 6]


def one_each(entries: list[int]) -> Rows:
    """Every row of a variant is a segment of its own."""
    runs = [(entry, row, row + 1) for row, entry in enumerate(entries) if entry]
    table = segment_table(runs) or [[0, 0, 0, 0]]
    entry_T, segments_G4 = (torch.tensor(made, dtype=torch.int32, device=DEVICE) for made in (entries, table))
    return replace(rows(entries), entry_T=entry_T, segments_G4=segments_G4)


def flat(target: Target) -> Config:
    """All columns of a row at once, as the ring has them: with column scales, parts are rounded one by one."""
    tiles, spread = gluon_ring.item(target)
    return Config("flat", outputs=64, inner=128, stages=2, tiles=tiles, spread=spread, depth=2)


def kinds_of(made: World) -> Kinds:
    return replace(made.kinds(), single=True)


def same(found: Partials, expected: Partials, x: torch.Tensor, weight: torch.Tensor) -> None:
    """The same bits of deltas; the base's product, as exact as its partials are."""
    assert found.delta_TN is not None
    assert expected.delta_TN is not None
    assert torch.equal(found.delta_TN.nan_to_num(7e7), expected.delta_TN.nan_to_num(7e7))
    rounding = 5e-5 if found.base_STN.dtype == torch.float32 else 2e-2
    for row, wanted in zip(found.base_STN.double().sum(0), x.double() @ weight.double().T, strict=True):
        near(row, wanted, rounding)


@pytest.mark.parametrize(
    ("dtype", "specs"), [(torch.bfloat16, SPECS), (torch.float16, COLUMNS)], ids=["bf16", "fp16 columns"]
)
@pytest.mark.parametrize("entries", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_bits_are_those_of_the_portable_kernel(
    target: Target, entries: list[int], dtype: torch.dtype, specs: list
) -> None:
    made, batch = world([Target(0, 16, 8), target], specs, dtype), one_each(entries)
    x, kinds = activations(len(entries), target.inputs, dtype), kinds_of(made)
    weight, expected = run(made, target, batch, x, flat(target), kinds=kinds)
    for config in (RING, STREAM):
        _, found = run(made, target, batch, x, config, kinds=kinds)
        same(found, expected, x, weight)


SEVERAL = {
    "identical": [1] * 8,
    "distinct": [1, 2, 4, 5, 6],
    "two each": [1, 1, 2, 2, 4, 4, 0, 0],
    "zipf": [1] * 13 + [2] * 4 + [3] * 3 + [4] * 2 + [5, 6, 7] + [0] * 4,
    "unsigned": [3] * 5 + [1] * 2,
    "base": [0, 0, 0],
    "64 rows": [1] * 20 + [2] * 9 + [4] * 16 + [5] * 3 + [6, 7] + [0] * 14,
    "crowd": [e for e in range(1, 10) for _ in range(e * 3)],
}


@pytest.mark.parametrize(
    ("dtype", "specs"), [(torch.bfloat16, SPECS), (torch.float16, COLUMNS)], ids=["bf16", "fp16 columns"]
)
@pytest.mark.parametrize("entries", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_several_rows_bit_for_bit(target: Target, entries: list[int], dtype: torch.dtype, specs: list) -> None:
    """As every row of a variant by itself, however many there are of it."""
    made, batch = world([Target(0, 16, 8), target], specs, dtype), rows(entries)
    x, kinds = activations(len(entries), target.inputs, dtype), made.kinds()
    weight, expected = run(made, target, one_each(sorted(entries)), x, flat(target), kinds=kinds_of(made))
    for config in (SOME, MANY):
        if config is SOME and len(entries) > gluon_rows.MOST_ROWS:
            continue
        _, found = run(made, target, batch, x, config, kinds=kinds)
        same(found, expected, x, weight)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_against_float64(target: Target) -> None:
    made, entries = world([Target(0, 16, 8), target], SPECS, torch.bfloat16), [1, 0, 2, 3, 9]
    x = activations(5, target.inputs, torch.bfloat16)
    for batch, kinds in ((one_each(entries), kinds_of(made)), (rows(entries), made.kinds())):
        _, out = run(made, target, batch, x, RING if kinds.single else SOME, kinds=kinds)
        assert out.delta_TN is not None
        for entry, start, stop in batch.segments:
            matrix = made.matrix(entry, target).double().to(DEVICE)
            near(out.delta_TN[start:stop], x[start:stop].double() @ matrix.T, 2e-3)
        assert out.delta_TN[batch.entry_T == 0].isnan().all(), "rows of the base are left alone"


def test_larger_vocabularies() -> None:
    """Columns up to each variant's own outputs; zeros from there on, in the base too."""
    target, specs = Target(0, 40, 1104), [{"signs": 1, "extra": 10}, {"signs": 1}, {"signs": 1, "extra": 27}, {}]
    made, entries = world([target], specs, torch.bfloat16), [1, 2, 3, 4]
    x = activations(4, 1104, torch.bfloat16)
    _, expected = run(made, target, one_each(entries), x, flat(target), 90, kinds_of(made))
    for batch, kinds in ((one_each(entries), kinds_of(made)), (rows(entries), made.kinds())):
        weight, found = run(made, target, batch, x, RING if kinds.single else SOME, 90, kinds)
        assert found.delta_TN is not None
        assert expected.delta_TN is not None
        assert torch.equal(found.delta_TN, expected.delta_TN)
        base = found.base_STN.double().sum(0)
        near(base[:, :40], x.double() @ weight.double().T, 1e-5)
        assert (base[:, 40:] == 0).all()


def test_the_check_of_this_device() -> None:
    found = ring_check(torch.device("cuda", torch.cuda.current_device()))
    assert found.ok, found.reason


@pytest.mark.parametrize("several", [False, True], ids=["a row each", "several rows"])
def test_every_program_and_again(several: bool) -> None:
    """Few programs go round the ring many times; a hundred launches after one another give the same."""
    target, entries = Target(0, 4096, 4096), [1, 2, 4, 5] * (1 + 3 * several)
    made = world([target], SPECS, torch.bfloat16)
    batch, kinds = (rows(sorted(entries)), made.kinds()) if several else (one_each(entries), kinds_of(made))
    x = activations(len(entries), 4096, torch.bfloat16)
    config = SOME if several else RING
    _, first = run(made, target, batch, x, config, kinds=kinds)
    assert first.delta_TN is not None
    for _ in range(100):
        _, again = run(made, target, batch, x, config, kinds=kinds)
        assert again.delta_TN is not None
        assert torch.equal(again.delta_TN, first.delta_TN)
        assert torch.equal(again.base_STN, first.base_STN)


@pytest.mark.parametrize("entries", [[1, 2, 0, 4], [2, 2, 0, 4]], ids=["a row each", "several rows"])
def test_a_captured_chain_reads_tables_and_rows_anew(entries: list[int]) -> None:
    """Planes, linear, planes, linear: each starts before the one before it has ended, none reads what is not there."""
    target, dtype = Target(0, 2048, 2048), torch.bfloat16
    made = world([target], SPECS, dtype)
    single = len(set(entries)) == len(entries)
    kinds, batch = (kinds_of(made), one_each(entries)) if single else (made.kinds(), rows(entries))
    x, y = activations(4, 2048, dtype), torch.empty(4, 2048, dtype=dtype, device=DEVICE)
    weight = torch.randn(2048, 2048, device=DEVICE).to(dtype) / 45
    planes, workspace = Planes.empty(1, 4, 2048, DEVICE), torch.empty(0, dtype=torch.uint8, device=DEVICE)
    outs = [partials_of(target, 4, kinds, dtype, DEVICE) for _ in range(2)]
    assert choose(target, 4, kinds, DEVICE).impl == "ring"

    def step() -> None:
        for given, out in ((x, outs[0]), (y, outs[1])):
            prepare_planes(given, planes, target, made.deltas, batch.entry_T, kinds)
            delta_linear(given, planes, weight, target, made.deltas, batch.segments_G4, kinds, out, workspace)
            if given is x:
                y.copy_(out.base_STN.sum(0))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(20):
        x.copy_(activations(4, 2048, dtype, seed=seed))
        graph.replay()
        for given, out in ((x, outs[0]), (y, outs[1])):
            assert out.delta_TN is not None
            for row, wanted in enumerate(given.double() @ weight.double().T):
                near(out.base_STN.double().sum(0)[row], wanted, 5e-5)
            for entry, start, stop in batch.segments:
                matrix = made.matrix(entry, target).double().to(DEVICE)
                near(out.delta_TN[start:stop], given[start:stop].double() @ matrix.T, 2e-3)
        near(y.double(), x.double() @ weight.double().T, 3e-2)
