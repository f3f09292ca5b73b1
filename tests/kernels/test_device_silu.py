"""SiLU x up and planes of it, against the float32 specification."""

from __future__ import annotations

import pytest
import torch

from kernels.device import Planes, Target
from kernels.silu_mul.device import silu_mul
from kernels.silu_mul.reference import silu_mul as silu_mul_reference
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, Rows, Spec, poisoned, rows, world
from tests.kernels.row_cases import assert_planes, random_partials, spoil_vectors, summed, vectors_of
from tests.kernels.test_device_planes import poisoned_planes

SIGNS: Spec = {"signs": 1}


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str) -> None:
    check(272, rows(MIXES[mix], padding=2), DTYPES[0], split=2, bias=True)


@pytest.mark.parametrize("inputs", [16, 256, 752, 2320])
@pytest.mark.parametrize("planes", [False, True])
def test_sizes(inputs: int, planes: bool) -> None:
    check(inputs, rows([0, 1, 2, 2]), DTYPES[1], split=1, planes=planes)
    check(inputs, rows([2]), DTYPES[1], split=3, delta=False, planes=planes)


def test_the_largest_row() -> None:
    check(29568, rows([1]), DTYPES[0], split=1)


def test_column_sets() -> None:
    specs: list[Spec] = [{"signs": 2, "col": True}, SIGNS, {"signs": 1, "col": True}]
    check(592, rows([0, 1, 2, 3]), DTYPES[0], split=2, specs=specs)


def test_a_bad_row_spoils_no_other() -> None:
    """NaN in one row, and in everything of a variant that no row has."""
    check(304, rows([1, 1, 3]), DTYPES[0], split=1, bias=True, bad_row=1, bad_entry=2)


def check(
    inputs: int, batch: Rows, dtype: torch.dtype, *, split: int, bias: bool = False, delta: bool = True,
    planes: bool = True, specs: list[Spec] | None = None, bad_row: int | None = None, bad_entry: int | None = None,
) -> None:  # fmt: skip
    gen, target = torch.Generator().manual_seed(split), Target(1, 48, inputs)
    made = world([Target(0, 16, 8), target], specs or [SIGNS] * 10, dtype, vectors=2 * inputs + 5)
    if bad_entry is not None:
        spoil_vectors(made, bad_entry)
    partials = random_partials(split, batch, 2 * inputs, dtype, gen, delta=delta)
    if bad_row is not None:
        partials.base_STN[:, bad_row] = torch.nan
    count, kinds, bias_span = batch.entry_T.shape[0], made.kinds(), (5, 2 * inputs + 5) if bias else None
    out = poisoned((count, inputs), dtype)
    made_planes = poisoned_planes(kinds.sets(target), count, inputs) if planes else None
    silu_mul(
        partials, made.deltas, bias_span, batch.entry_T, out, made_planes, target if planes else None, kinds
    )  # fmt: skip

    gate_up = summed(partials, batch)
    if bias_span:
        gate_up += vectors_of(made, batch.entry_T, bias_span)
    good = torch.tensor([row for row in range(count) if row != bad_row], device=DEVICE)
    eps = max(2 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(out[good], silu_mul_reference(gate_up, dtype)[good], rtol=eps, atol=eps)
    if made_planes:
        parts = (made_planes.words_CTW, made_planes.scale_CT, made_planes.sum_CT)
        assert_planes(Planes(*(t[:, good] for t in parts)), out[good], made, batch.entry_T[good], target)
