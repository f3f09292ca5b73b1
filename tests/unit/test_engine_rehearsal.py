"""The steps that a start computes: no larger than steps may be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitdelta_core.engine.rehearsal import STEPS, steps


@given(st.integers(1, 4096), st.integers(1, 256), st.integers(1, 4096), st.integers(1, 256))
def test_every_step_is_possible(rows: int, sequences: int, longest: int, logits: int) -> None:
    found = steps(rows, sequences, longest, logits)
    assert len(found) == len(set(found)) <= len(STEPS)
    for lengths, wanted in found:
        assert 0 < len(lengths) <= sequences
        assert 0 < min(lengths) <= max(lengths) <= longest
        assert sum(lengths) <= rows
        assert 0 < wanted <= min(logits, sum(lengths))
    assert sum(found[0][0]) == min(rows, longest), "the largest prompt comes first"


def test_nothing_is_cut_where_there_is_room() -> None:
    found = steps(2048, 64, 2048, 256)
    assert len(found) == len(STEPS)
    assert found[1:] == list(STEPS[1:])
