"""Which rows of a batch belong to which delta.

Not covered: device tables for CUDA graphs; they are derived from these in the Triton launchers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BASE = -1
"""Slot of the rows that run on the bare base."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:stop` of a batch, all of the delta in `slot` (BASE: no delta)."""

    slot: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def check_segments(segments: Sequence[Segment], rows: int) -> None:
    """Assert that the segments tile rows 0..rows exactly, in order, none empty."""
    at = 0
    for segment in segments:
        assert segment.start == at, f"segment starts at {segment.start}, expected {at}"
        assert segment.stop > segment.start, f"empty segment {segment}"
        assert segment.slot >= BASE, f"bad slot {segment.slot}"
        at = segment.stop
    assert at == rows, f"segments cover {at} of {rows} rows"
