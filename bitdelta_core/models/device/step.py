"""What the host tells the device of one step: all of it in one pinned buffer, one copy, views at fixed addresses.

Shapes: T rows, S sequences, M blocks per sequence, G segments, L rows with logits, I row tiles (wide steps only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod

import numpy as np
import torch

from kernels.device import StepRows
from kernels.sampling.rows import COLUMNS, SamplingRows

_ALIGNMENT = 64
"""int32 elements: 256 bytes"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSize:
    """The most that one set of buffers can describe."""

    rows: int
    sequences: int
    segments: int
    logits: int
    blocks: int
    tiles: int = 0

    @classmethod
    def decode(cls, rows: int, blocks: int) -> StepSize:
        """One row of each sequence, logits of all."""
        return cls(rows=rows, sequences=rows, segments=rows, logits=rows, blocks=blocks)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        t, s, g, n = self.rows, self.sequences, self.segments, self.logits
        return {
            "tokens_T": (t,),
            "source_T": (t,),
            "positions_T": (t,),
            "kv_slots_T": (t,),
            "entry_T": (t,),
            "query_starts_S1": (s + 1,),
            "context_lens_S": (s,),
            "segments_G4": (g, 4),
            "logit_rows_L": (n,),
            "logit_segments_G4": (g, 4),
            "sampling_LF": (n, COLUMNS),
            "tiles_I4": (self.tiles, 4),
            "block_tables_SM": (s, self.blocks),
        }


@dataclass(frozen=True, slots=True)
class HostStep:
    """Where the host writes a step: int32 views of a pinned buffer, set to padding. Names as in `StepRows`."""

    tokens_T: np.ndarray
    source_T: np.ndarray
    positions_T: np.ndarray
    kv_slots_T: np.ndarray
    entry_T: np.ndarray
    query_starts_S1: np.ndarray
    """Write it with `set_starts`."""
    context_lens_S: np.ndarray
    segments_G4: np.ndarray
    logit_rows_L: np.ndarray
    logit_segments_G4: np.ndarray
    sampling_LF: np.ndarray
    """One `RowValues.pack` per row with logits; a row of zeros is not sampled."""
    tiles_I4: np.ndarray
    block_tables_SM: np.ndarray
    """What earlier steps left stands beyond the rows that are written: harmless, those sequences have no context."""

    def set_starts(self, starts: Sequence[int]) -> None:
        """Row offsets of the sequences that there are, and their end; the others have no rows."""
        self.query_starts_S1[: len(starts)] = starts
        self.query_starts_S1[len(starts) :] = starts[-1]


class StepBuffers:
    """The metadata of steps up to one size; a step of padding at first.

    There are two host buffers, so that the host can write a step while the copy of the last one still waits for its
    turn on the device.
    """

    def __init__(self, size: StepSize, device: torch.device) -> None:
        self.size = size
        self._device = torch.empty(_total(size), dtype=torch.int32, device=device)
        self._hosts = [torch.zeros(_total(size), dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._copied = [torch.cuda.Event() if device.type == "cuda" else None for _ in range(2)]
        self._current = 0
        self._views = _views(size, self._device)
        self.rows = self.narrowed(size.rows, size.sequences, size.segments, size.logits)
        self.sampling = SamplingRows(self._views["sampling_LF"])
        self.begin()
        self.upload()

    @property
    def nbytes(self) -> int:
        return self._device.nbytes

    def begin(self) -> HostStep:
        """The next host buffer, all padding. Waits until the copy from it, two steps ago, has been made."""
        self._current = 1 - self._current
        copied, host = self._copied[self._current], self._hosts[self._current]
        if copied is not None:
            copied.synchronize()
        step = HostStep(**{name: view.numpy() for name, view in _views(self.size, host).items()})
        for field in fields(step):
            if field.name != "block_tables_SM":
                getattr(step, field.name).fill(-1 if field.name == "source_T" else 0)
        return step

    def upload(self) -> None:
        """One copy of what `begin` gave, in stream order. Does not wait."""
        self._device.copy_(self._hosts[self._current], non_blocking=True)
        if (copied := self._copied[self._current]) is not None:
            copied.record()

    def narrowed(self, rows: int, sequences: int, segments: int, logits: int) -> StepRows:
        """The device views cut to what a wide step uses."""
        v = self._views
        return StepRows(
            tokens_T=v["tokens_T"][:rows],
            source_T=v["source_T"][:rows],
            positions_T=v["positions_T"][:rows],
            kv_slots_T=v["kv_slots_T"][:rows],
            entry_T=v["entry_T"][:rows],
            query_starts_S1=v["query_starts_S1"][: sequences + 1],
            context_lens_S=v["context_lens_S"][:sequences],
            block_tables_SM=v["block_tables_SM"][:sequences],
            segments_G4=v["segments_G4"][:segments],
            logit_rows_L=v["logit_rows_L"][:logits],
            logit_segments_G4=v["logit_segments_G4"][:segments],
        )

    def tiles(self, count: int) -> torch.Tensor:
        """Row tiles of one variant each: see `kernels.delta_linear.wide`."""
        return self._views["tiles_I4"][:count]


def _total(size: StepSize) -> int:
    return sum(_padded(prod(shape)) for shape in size.shapes().values())


def _padded(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _views(size: StepSize, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    views, at = {}, 0
    for name, shape in size.shapes().items():
        views[name] = buffer[at : at + prod(shape)].view(shape)
        at += _padded(prod(shape))
    return views
