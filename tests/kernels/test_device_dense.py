"""Dense parts of decode-sized segments, read through the device tables, against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.delta_linear import table_reference, wide
from kernels.device import NONE, Field, Target
from tests.kernels.device_harness import DEVICE, DTYPES, ENTRIES, MIXES, Rows, Spec, World, rows, world

FUSED = Target(0, 80, 72, (0, 48, 64))
SPECS: list[Spec] = [*ENTRIES.values(), {"dense": True, "extra": 11}]
LARGER = len(SPECS)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixes(mix: str, dtype: torch.dtype) -> None:
    check(world([FUSED], SPECS, dtype), FUSED, rows(MIXES[mix], padding=2, spare_segments=1))


@pytest.mark.parametrize("shape", [(17, 1000), (300, 8), (64, 256)], ids=str)
def test_sizes(shape: tuple[int, int]) -> None:
    target = Target(0, *shape)
    check(world([target], SPECS, DTYPES[0], seed=1), target, rows([7, 9, 9, LARGER]))


def test_more_rows_than_a_block() -> None:
    check(world([FUSED], SPECS, DTYPES[0], seed=2), FUSED, rows([7] * 70 + [9]))


def test_follows_a_table_that_changes() -> None:
    w = world([FUSED], SPECS, DTYPES[0], seed=3)
    check(w, FUSED, rows([7, 7]))
    w.deltas.table_EJF[7] = w.deltas.table_EJF[LARGER].clone()
    check(w, FUSED, rows([7, 7]))
    w.deltas.table_EJF[7] = w.deltas.table_EJF[8].clone()  # nothing
    check(w, FUSED, rows([7, 7]))


def check(w: World, target: Target, batch: Rows) -> None:
    count = batch.entry_T.shape[0]
    x = torch.randn(count, target.inputs, device=DEVICE).to(w.dtype)
    delta = torch.randn(count, target.outputs + 11, device=DEVICE)
    want = delta.double()
    for entry, start, stop in batch.segments:
        matrix = table_reference.dense(w.deltas, target, entry, w.dtype)
        if matrix is not None:
            want[start:stop, : matrix.shape[0]] += x[start:stop].double() @ matrix.double().T
    before = delta.clone()
    wide.dense(x, target, w.deltas, batch.segments_G4, delta)
    assert (delta - want).abs().max() <= 1e-5 * want.abs().max()
    empty = w.deltas.table_EJF[batch.entry_T.long(), target.index, Field.DENSE] == NONE
    assert torch.equal(delta[empty], before[empty]), "rows without a dense part were touched"
