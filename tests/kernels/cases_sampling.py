"""Launches of the sampling kernels."""

from __future__ import annotations

from kernels.sampling import sample
from kernels.sampling.rows import GREEDY, Sampled, SamplingRows, Wants
from kernels.sampling.workspace import Workspace
from tests.kernels.compile_harness import Case
from tests.kernels.meta import ints, meta


def _sample(rows: int, vocab: int, wants: Wants, *, counted: bool) -> None:
    import torch

    given = SamplingRows.empty(rows, "meta"), ints(64, vocab) if counted else None, Sampled.empty(rows, "meta")
    workspace = Workspace.empty(rows, vocab, "meta")
    sample(meta(rows, vocab, dtype=torch.float32), *given, workspace, wants, impl="triton")


CASES = [
    Case(
        "sampling 128256 greedy",
        lambda: _sample(16, 128256, GREEDY, counted=False),
        {90: (r"LDG\.E\.128", "ACQBULK", "PREEXIT")},
    ),
    Case(
        "sampling 128256",
        lambda: _sample(64, 128256, Wants(), counted=True),
        {90: (r"LDG\.E\.128", "ACQBULK", "PREEXIT")},
    ),
    Case("sampling 32001", lambda: _sample(1, 32001, Wants(), counted=False)),
]
