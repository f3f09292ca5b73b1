"""Launches of the logits kernel."""

from __future__ import annotations

import torch

from kernels.device import Partials
from kernels.logits.device import logits
from tests.kernels.compile_harness import Case
from tests.kernels.meta import entries, meta


def _logits(rows: int, columns: int, split: int) -> None:
    base, delta = meta(split, rows, columns, dtype=torch.float32), meta(rows, columns, dtype=torch.float32)
    vocab = meta(8, dtype=torch.int32)
    logits(Partials(base, delta), entries(rows), vocab, meta(rows, columns, dtype=torch.float32))


CASES = [
    Case(
        "logits 128512",
        lambda: _logits(16, 128512, 2),
        {80: (r"LDG\.E\.128",), 90: (r"LDG\.E\.128", "ACQBULK", "PREEXIT")},
    )
]
