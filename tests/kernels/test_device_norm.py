"""Residual addition, norm and planes in one launch, against the float32 specification."""

from __future__ import annotations

import pytest
import torch

from kernels.device import Target
from kernels.rms_norm import reference
from kernels.rms_norm.device import add_norm
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, Rows, Spec, poisoned, rows, world
from tests.kernels.row_cases import assert_planes, random_partials, spoil_vectors, summed, vectors_of
from tests.kernels.test_device_planes import poisoned_planes

EPS = 1e-5
SIGNS: Spec = {"signs": 1}
COLUMNS: Spec = {"signs": 2, "col": True}


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str) -> None:
    check(320, rows(MIXES[mix], padding=2), DTYPES[0], DTYPES[0], split=2, bias=True)


def test_many_rows_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were so many that a row has one program, for which fewer have three."""
    monkeypatch.setattr("kernels.planes.FEW_ROWS", 2)
    check(2320, rows([0, 1, 2]), DTYPES[0], DTYPES[0], split=1)
    check(2320, rows([0, 1, 2]), DTYPES[0], DTYPES[0], split=1, specs=[COLUMNS, SIGNS])


@pytest.mark.parametrize("inputs", [8, 100, 256, 700, 2304])
@pytest.mark.parametrize("residual", [torch.float32, torch.float16], ids=str)
def test_sizes(inputs: int, residual: torch.dtype) -> None:
    check(inputs, rows([0, 1, 1, 2]), torch.float16, residual, split=3)


@pytest.mark.parametrize("split", [0, 1, 4])
@pytest.mark.parametrize("planes", [False, True])
def test_forms(split: int, planes: bool) -> None:
    batch, dtype = rows([0, 1, 1, 4], padding=1), DTYPES[1]
    check(300, batch, dtype, dtype, split=split, delta=split != 4, planes=planes)
    check(300, batch, dtype, dtype, split=split, bias=split == 1, planes=planes, wanted=[3, 0, 4, 3])


@pytest.mark.parametrize("wanted", [None, [3, 0]])
def test_column_sets(wanted: list[int] | None) -> None:
    """Variants with column scales next to others, and as many planes as they have."""
    specs: list[Spec] = [COLUMNS, SIGNS, COLUMNS, {"signs": 1, "col": True}]
    check(600, rows([0, 1, 2, 3, 4]), DTYPES[0], DTYPES[0], split=1, specs=specs, wanted=wanted)


def test_in_place_without_planes() -> None:
    check(100, rows([0, 1, 2]), DTYPES[0], DTYPES[0], split=1, planes=False, in_place=True)


def test_a_residual_cannot_be_written_while_its_row_is_read() -> None:
    with pytest.raises(AssertionError, match="read while it is written"):
        check(100, rows([0, 1, 2]), DTYPES[0], DTYPES[0], split=1, in_place=True)


def test_a_bad_row_spoils_no_other() -> None:
    """NaN in one row's residual, and in everything of a variant that no row has."""
    batch = rows([1, 1, 3])
    check(300, batch, DTYPES[0], DTYPES[0], split=1, bad_row=1, bad_entry=2)


def check(
    inputs: int, batch: Rows, dtype: torch.dtype, residual_dtype: torch.dtype, *, split: int, bias: bool = False,
    delta: bool = True, planes: bool = True, wanted: list[int] | None = None, specs: list[Spec] | None = None,
    in_place: bool = False, bad_row: int | None = None, bad_entry: int | None = None,
) -> None:  # fmt: skip
    gen, target = torch.Generator().manual_seed(split), Target(1, 48, inputs, (0, 32))
    made = world([Target(0, 16, 8), target], specs or [SIGNS] * 10, dtype, vectors=2 * inputs + 5)
    if bad_entry is not None:
        spoil_vectors(made, bad_entry)
    count = batch.entry_T.shape[0]
    residual = torch.randn(count, inputs, generator=gen).to(residual_dtype).to(DEVICE)
    if bad_row is not None:
        residual[bad_row] = torch.nan
    before = residual.clone()
    partials = random_partials(split, batch, inputs, dtype, gen, delta=delta) if split else None
    span, bias_span = (3, inputs + 3), (inputs + 5, 2 * inputs + 5) if bias else None
    picked = torch.tensor(range(count) if wanted is None else wanted, dtype=torch.int32, device=DEVICE)
    stream = residual if in_place else poisoned(residual.shape, residual_dtype)
    out, kinds = poisoned((len(picked), inputs), dtype), made.kinds()
    made_planes = poisoned_planes(kinds.sets(target), len(picked), inputs) if planes else None
    add_norm(
        residual, partials, made.deltas, span, bias_span, batch.entry_T, EPS, out, made_planes,
        target if planes else None, kinds, residual_out_TK=None if wanted else stream,
        rows_L=picked if wanted else None,
    )  # fmt: skip

    added = None if partials is None else summed(partials, batch)
    if added is not None and bias_span:
        added += vectors_of(made, batch.entry_T, bias_span)
    weight = vectors_of(made, batch.entry_T, span)
    expected_stream, expected = reference.add_norm(before, added, weight, EPS, dtype)
    good = torch.tensor([i for i, row in enumerate(picked.tolist()) if row != bad_row])
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out[good], expected[picked.long()][good], **close)
    if not wanted:
        torch.testing.assert_close(stream[good], expected_stream[good])
    if made_planes:
        parts = (made_planes.words_CTW, made_planes.scale_CT, made_planes.sum_CT)
        own = type(made_planes)(*(t[:, good] for t in parts))
        assert_planes(own, out[good], made, batch.entry_T[picked.long()][good], target)
