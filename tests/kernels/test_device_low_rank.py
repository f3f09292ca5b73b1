"""Low-rank parts of decode-sized segments, read through the device tables, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.delta_linear import low_rank_choice, table_reference, wide
from kernels.device import DeviceDeltas, Field, Target
from tests.kernels.device_harness import DEVICE, DTYPES, ENTRIES, MIXES, POISON, Rows, Spec, World, rows, world

FUSED = Target(1, 80, 72, (0, 48, 64))
SINGLE = Target(0, 40, 136)
SPECS: list[Spec] = [*ENTRIES.values(), {"rank": 16, "members": (1,)}]
ONE_MEMBER = len(SPECS)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest output: x A^T is rounded to the compute dtype"""


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixes(mix: str, dtype: torch.dtype) -> None:
    w = world([SINGLE, FUSED], SPECS, dtype)
    check(w, FUSED, rows(MIXES[mix], padding=2, spare_segments=1), max_rank=48)


SPLIT_UNEVENLY = Target(0, 17, 1408)
"""11 steps along K in 4 parts"""


@pytest.mark.parametrize(
    "target", [SINGLE, FUSED, SPLIT_UNEVENLY, Target(0, 17, 1000), Target(1, 300, 8, (0, 16, 288))], ids=str
)
def test_sizes(target: Target) -> None:
    w = world([SINGLE, target] if target.index else [target, FUSED], SPECS, DTYPES[0], seed=1)
    check(w, target, rows([5, 6, 6, 9, ONE_MEMBER]), max_rank=64)


def test_ranks_from_16_to_512_in_one_batch() -> None:
    w = world([SINGLE], [{"rank": rank} for rank in (4, 512, 16, 200)], torch.float16, seed=2)
    check(w, SINGLE, rows([1, 2, 2, 3, 4]), max_rank=512)


def test_more_rows_than_a_block() -> None:
    w = world([SINGLE, FUSED], SPECS, DTYPES[0], seed=3)
    check(w, FUSED, rows([5] * 19 + [6] * 33), max_rank=48)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    w = world([SINGLE, FUSED], SPECS, torch.float16, seed=4)
    x = torch.randn(4, FUSED.inputs, device=DEVICE).to(torch.float16)
    alone, among = torch.zeros(4, 80, device=DEVICE), torch.zeros(4, 80, device=DEVICE)
    run(w.deltas, FUSED, x, rows([6] * 4), alone, 48)
    run(w.deltas, FUSED, x, rows([5, 6, 7, 9]), among, 48)
    assert torch.equal(alone[1], among[1])
    assert not torch.equal(alone[0], among[0])


def test_follows_a_table_that_changes() -> None:
    """A slot is given to another variant between two replays of one graph."""
    w = world([SINGLE, FUSED], SPECS, DTYPES[0], seed=5)
    batch = rows([5, 5])
    check(w, FUSED, batch, max_rank=48)
    w.deltas.table_EJF[5] = w.deltas.table_EJF[6].clone()
    check(w, FUSED, batch, max_rank=48)
    w.deltas.table_EJF[5] = w.deltas.table_EJF[8].clone()  # nothing
    check(w, FUSED, batch, max_rank=48)


@pytest.mark.parametrize("mix", MIXES)
def test_overwrites(mix: str) -> None:
    """Rows of segments, in all columns, zeros where a variant has no factors; the base's rows are left alone."""
    w, batch = world([SINGLE, FUSED], SPECS, DTYPES[0]), rows(MIXES[mix], padding=2, spare_segments=1)
    x = torch.randn(batch.entry_T.shape[0], FUSED.inputs, device=DEVICE).to(w.dtype)
    into = torch.full((x.shape[0], FUSED.outputs + 3), torch.nan, device=DEVICE)
    want = into.double()
    for entry, start, stop in batch.segments:
        want[start:stop] = 0.0
        matrix = table_reference.low_rank(w.deltas, FUSED, entry, w.dtype)
        if matrix is not None:
            want[start:stop, : FUSED.outputs] = x[start:stop].double() @ matrix.double().T
    run(w.deltas, FUSED, x, batch, into, 48, add=False)
    largest = max(1.0, want.nan_to_num().abs().max().item())
    torch.testing.assert_close(into.double(), want, rtol=0, atol=TOLERANCE[w.dtype] * largest, equal_nan=True)


def check(w: World, target: Target, batch: Rows, max_rank: int) -> None:
    count = batch.entry_T.shape[0]
    x = torch.randn(count, target.inputs, device=DEVICE).to(w.dtype)
    into = torch.randn(count, target.outputs + 3, device=DEVICE)
    want = into.double()
    for entry, start, stop in batch.segments:
        matrix = table_reference.low_rank(w.deltas, target, entry, w.dtype)
        if matrix is not None:
            want[start:stop, : target.outputs] += x[start:stop].double() @ matrix.double().T
    run(w.deltas, target, x, batch, into, max_rank)
    assert (into - want).abs().max() <= TOLERANCE[w.dtype] * max(1.0, want.abs().max().item())
    empty = w.deltas.table_EJF[batch.entry_T.long(), target.index, Field.RANK] == 0
    assert torch.equal(into[empty], want[empty].float()), "rows without a low-rank part were touched"


def run(
    d: DeviceDeltas,
    target: Target,
    x: torch.Tensor,
    batch: Rows,
    into: torch.Tensor,
    max_rank: int,
    *,
    add: bool = True,
) -> None:
    size = 4 * low_rank_choice.workspace_floats(target, x.shape[0], max_rank)
    workspace = torch.full((size,), POISON, dtype=torch.uint8, device=DEVICE)
    wide.low_rank(x, target, d, batch.segments_G4, max_rank, into, workspace, add=add)


@given(st.integers(1, 32).map(lambda n: 16 * n), st.integers(1, 3), st.integers(1, 64))
def test_few_segments_have_a_program_for_each_block_of_ranks(rank: int, members: int, segments: int) -> None:
    target = Target(0, 12288, 4096, tuple(4096 * i for i in range(members)))
    config = low_rank_choice.choose(target, segments, rank, torch.device("cpu"))
    all_blocks = -(-members * rank // config.rank_block)
    found = low_rank_choice.shrink_blocks(config, members * rank, segments)
    assert min(config.blocks, all_blocks) <= found <= all_blocks
    assert found <= config.blocks or found * segments * config.split <= 256
    assert found == all_blocks or segments > 1
