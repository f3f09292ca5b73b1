"""Which steps are computed at a start, so that no kernel of byte factors is compiled while somebody waits."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.delta_linear import foreseen
from kernels.device import Target

CPU = torch.device("cpu")
ROWS, SEQUENCES = 2048, 64
PROMPTS = [[2048], [400], [200], [100], [48], [24], [8]]


def targets(hidden: int, inner: int, kv: int) -> list[Target]:
    qkv = Target(0, hidden + 2 * kv, hidden, (0, hidden, hidden + kv))
    return [qkv, Target(1, hidden, hidden), Target(2, 2 * inner, hidden, (0, inner)), Target(3, hidden, inner)]


SHAPES = {
    "12M": (targets(384, 1024, 384), 256),
    "100M": (targets(768, 2048, 768), 512),
    "7B": (targets(4096, 11008, 4096), 512),
    "8B": (targets(4096, 14336, 1024), 1024),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_random_steps_meet_little_that_is_new(shape: str) -> None:
    made, rank = SHAPES[shape]
    steps = foreseen.mixes(made, rank, ROWS, SEQUENCES, CPU, PROMPTS)
    assert len(steps) <= 20
    known = {launch for step in [*PROMPTS, *steps] for launch in foreseen.launches(made, rank, step, CPU)}
    alone = {launch for step in PROMPTS for launch in foreseen.launches(made, rank, step, CPU)}
    draw, met = random.Random(0), set()
    for _ in range(1500):
        most = draw.choice((3, 5, 8, 11))
        lengths = [max(1, int(2 ** draw.uniform(0, most))) for _ in range(int(2 ** draw.uniform(0, 6)))]
        if sum(lengths) <= ROWS:
            met |= foreseen.launches(made, rank, lengths, CPU)
    assert len(met - known) <= 0.05 * len(met)
    assert len(met - alone) >= 0.25 * len(met), "prompts of one variant would do"


@given(st.integers(1, 4096), st.integers(1, 64), st.lists(st.integers(1, 300), max_size=4))
def test_every_step_is_possible_and_needed(rows: int, sequences: int, known: list[int]) -> None:
    made, rank = SHAPES["100M"]
    seen = {launch for length in known for launch in foreseen.launches(made, rank, [length], CPU)}
    for lengths in foreseen.mixes(made, rank, rows, sequences, CPU, [[length] for length in known]):
        assert len(lengths) <= sequences
        assert sum(lengths) <= rows
        needed = foreseen.launches(made, rank, lengths, CPU)
        assert needed - seen
        seen |= needed
