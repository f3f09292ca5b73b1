"""Replaced and added rows of a head, read through the device tables, against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.delta_linear import wide
from kernels.device import Partials, Target
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, Rows, Spec, World, rows, world

HEAD = Target(0, 40, 136)
WIDEST = 50
SPECS: list[Spec] = [
    {"rows": 3},
    {"signs": 1, "rows": 5, "extra": 10},
    {},
    {"rows": 40},
    {"signs": 1},
    {"rows": 16},
    {"rows": 1},
    {"dense": True, "rows": 17, "extra": 3},
    {"rows": 2},
]


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str) -> None:
    check(
        world([HEAD], SPECS, torch.float16), rows(MIXES[mix], padding=2, spare_segments=1), split=2, base=torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_base_in_the_compute_dtype(dtype: torch.dtype) -> None:
    check(world([HEAD], SPECS, dtype, seed=1), rows([2] * 18 + [8]), split=1, base=dtype)


def test_more_rows_than_one_round_of_programs() -> None:
    target = Target(0, 600, 8)
    w = world([target], [{"rows": 560}], torch.float16, seed=2)
    check(w, rows([1, 1]), split=1, base=torch.float32)


def test_follows_a_table_that_changes() -> None:
    w = world([HEAD], SPECS, DTYPES[0], seed=3)
    check(w, rows([1, 1]), split=1, base=torch.float32)
    w.deltas.table_EJF[1], w.meaning[1, 0] = w.deltas.table_EJF[4].clone(), w.meaning[4, 0]
    check(w, rows([1, 1]), split=1, base=torch.float32)
    w.deltas.table_EJF[1], w.meaning[1, 0] = w.deltas.table_EJF[3].clone(), []
    check(w, rows([1, 1]), split=1, base=torch.float32)


def check(w: World, batch: Rows, split: int, base: torch.dtype) -> None:
    target, count = w.targets[0], batch.entry_T.shape[0]
    width = max(WIDEST, target.outputs)
    x = torch.randn(count, target.inputs, device=DEVICE).to(w.dtype)
    out = Partials(torch.randn(split, count, width, device=DEVICE).to(base), torch.randn(count, width, device=DEVICE))
    assert out.delta_TN is not None
    base_want, delta_want = out.base_STN.clone(), out.delta_TN.double()
    for entry, start, stop in batch.segments:
        replaced = w.replaced(entry, target)
        if replaced is not None:
            index = replaced.index_R.to(DEVICE)
            base_want[:, start:stop, index] = 0
            delta_want[start:stop, index] = x[start:stop].double() @ replaced.value_RK.to(DEVICE).double().T
    wide.replace_rows(x, target, w.deltas, batch.segments_G4, out)
    assert torch.equal(out.base_STN, base_want)
    assert (out.delta_TN - delta_want).abs().max() <= 1e-5 * delta_want.abs().max()
