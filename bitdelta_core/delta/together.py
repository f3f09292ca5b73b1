"""The factors of a delta's matrices, of which several are decoded together, for whoever asks for them one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from bitdelta_core.delta import spectral
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import DeltaFormatError

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""As `spectral.factors` has them"""


class Reader(Protocol):
    """Where the stored parts come from: `bitdelta_core.delta.format.DeltaReader`."""

    def part(self, entry: TensorEntry, part: str) -> torch.Tensor: ...


class FactorsTogether:
    """A reader that has factors, too."""

    def __init__(self, reader: Reader, entries: Sequence[TensorEntry]) -> None:
        """`entries`: those of codec `spectral` that factors will be asked of, in that order."""
        self._reader = reader
        self._waiting = deque(spectral.together(entries, torch.device("cpu")))
        self._found: dict[str, Factors] = {}

    def part(self, entry: TensorEntry, part: str) -> torch.Tensor:
        return self._reader.part(entry, part)

    def factors(self, entry: TensorEntry) -> Factors:
        """Once for each entry.

        Raises:
            DeltaFormatError: its code, or that of an entry that is decoded together with it, does not decode.
        """
        while entry.name not in self._found:
            assert self._waiting, f"{entry.name} is none of those that were to be decoded"
            group = self._waiting.popleft()
            stored = [(e, {part: self.part(e, part) for part in e.parts() if part != "extra"}) for e in group]
            self._found |= _factors_of(stored)
        return self._found.pop(entry.name)


def _factors_of(stored: Sequence[tuple[TensorEntry, Mapping[str, torch.Tensor]]]) -> dict[str, Factors]:
    try:
        found = spectral.coded_of(stored, torch.device("cpu"))
    except DeltaFormatError:
        for entry, parts in stored:
            spectral.factors(entry, parts)  # raises, and names the one that is to blame
        raise
    return {
        entry.name: (coded.a_rK, coded.b_rN.T, spectral.component_scales(parts["scale"], parts["exponent"]))
        for (entry, parts), coded in zip(stored, found, strict=True)
    }
