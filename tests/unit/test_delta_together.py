"""Factors that are decoded with others."""

from __future__ import annotations

import pytest
import torch

from bitdelta_core.delta import spectral
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.spectral import Coded
from bitdelta_core.delta.together import FactorsTogether
from bitdelta_core.errors import DeltaFormatError

CPU = torch.device("cpu")


class Stored:
    """Entries of some matrices, and their parts."""

    def __init__(self, count: int = 9) -> None:
        generator = torch.Generator().manual_seed(count)
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        self.entries: list[TensorEntry] = []
        self.asked: list[str] = []
        for i in range(count):
            rank, columns, rows = 2 + i % 4, 16 + 8 * i, 24 + i
            a, b = (torch.randint(-9, 10, (rank, n), generator=generator, dtype=torch.int8) for n in (columns, rows))
            coded = Coded(a, b, 0.5 + i, torch.arange(rank, dtype=torch.uint8))
            [parts] = spectral.parts_of([coded], CPU)
            shape, size = (rows, columns), len(parts["code"])
            entry = TensorEntry(name=f"m{i}", shape=shape, codec="spectral", rank=rank, rows=rows, code_bytes=size)
            self.entries.append(entry)
            self.parts[entry.name] = parts

    def part(self, entry: TensorEntry, part: str) -> torch.Tensor:
        self.asked.append(entry.name)
        return self.parts[entry.name][part]


@pytest.fixture(params=[1, 400, 1 << 25], ids=["a matrix at once", "a few", "all"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(spectral, "_TOGETHER", {"cpu": request.param})
    return request.param


def test_they_are_what_they_would_be_one_by_one(room: int) -> None:
    stored = Stored()
    together = FactorsTogether(stored, stored.entries)
    for entry in stored.entries:
        parts = stored.parts[entry.name]
        for found, expected in zip(together.factors(entry), spectral.factors(entry, parts), strict=True):
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype


def test_no_more_is_read_than_is_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "_TOGETHER", {"cpu": 1})
    stored = Stored()
    together = FactorsTogether(stored, stored.entries)
    together.factors(stored.entries[0])
    assert set(stored.asked) == {"m0"}


@pytest.mark.usefixtures("room")
def test_the_matrix_whose_code_is_bad_is_named() -> None:
    stored = Stored()
    code = stored.parts["m4"]["code"]
    stored.parts["m4"]["code"] = torch.cat([code[:-2], code[-2:] ^ 1])
    with pytest.raises(DeltaFormatError, match=r"m4\.code"):
        all_of(FactorsTogether(stored, stored.entries), stored.entries)


def all_of(together: FactorsTogether, entries: list[TensorEntry]) -> None:
    for entry in entries:
        together.factors(entry)


def test_others_are_not_decoded() -> None:
    stored = Stored()
    together = FactorsTogether(stored, [])
    assert torch.equal(together.part(stored.entries[0], "code"), stored.parts["m0"]["code"])
    with pytest.raises(AssertionError, match="none of those"):
        together.factors(stored.entries[0])
