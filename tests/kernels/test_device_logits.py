"""Logits from partial products, against the specification."""

from __future__ import annotations

import pytest
import torch

from kernels.logits import reference
from kernels.logits.device import logits
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, poisoned, rows
from tests.kernels.row_cases import random_partials


@pytest.mark.parametrize("mix", ["zipf", "base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("split", "columns"), [(1, 263), (3, 1025)])
def test_mixes(mix: str, dtype: torch.dtype, split: int, columns: int) -> None:
    batch, gen = rows(MIXES[mix], padding=2), torch.Generator().manual_seed(split)
    vocab_E = torch.randint(1, columns + 1, (12,), generator=gen, dtype=torch.int32).to(DEVICE)
    vocab_E[3], vocab_E[2] = columns, 0
    for delta in (True, False):
        partials = random_partials(split, batch, columns, dtype, gen, delta=delta)
        out = poisoned((len(batch.entry_T), columns), torch.float32)
        logits(partials, batch.entry_T, vocab_E, out)
        torch.testing.assert_close(out, reference.logits(partials, batch.entry_T, vocab_E), rtol=1e-6, atol=1e-6)
        assert not out.isnan().any()
