"""Embedding rows through device tables, against the float32 specification of each variant's whole table."""

from __future__ import annotations

import pytest
import torch

from kernels.device import Target
from kernels.embedding.device import embed
from kernels.embedding.reference import merged
from tests.kernels.device_harness import DEVICE, DTYPES, ENTRIES, MIXES, Rows, Spec, poisoned, rows, world

VOCABULARY = 45
KINDS: dict[str, Spec] = {
    **ENTRIES,
    "2 bits": {"quant": 2},
    "4 bits": {"quant": 4},
    "rows": {"rows": 9},
    "grown, rows": {"rows": VOCABULARY + 12, "extra": 12},
    "grown, signs": {"signs": 2, "col": True, "extra": 20},
    "grown, dense": {"dense": True, "extra": 3},
    "rows over signs": {"signs": 1, "rows": 20},
    "rank 5 of bytes": {"bytes": 5},
    "rank 40 of bytes": {"bytes": 40},
    "grown, bytes": {"bytes": 20, "rows": VOCABULARY + 7, "extra": 7},
    "bytes over signs": {"signs": 1, "bytes": 16},
    "grown, low rank": {"rank": 20, "rows": VOCABULARY + 7, "extra": 7},
}


@pytest.mark.parametrize(("inputs", "dtype"), [(100, 1), (256, 0), (1300, 1)])
def test_every_kind(inputs: int, dtype: int) -> None:
    """One row of every kind of variant and more of the base, in one launch."""
    count = len(KINDS)
    check(list(KINDS.values()), rows([0, 0, *range(1, count + 1)], padding=2), inputs, DTYPES[dtype])


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str) -> None:
    check([*ENTRIES.values(), {"rows": 5}], rows(MIXES[mix], padding=1), 300, DTYPES[0])


@pytest.mark.parametrize("name", KINDS)
def test_first_and_last_tokens(name: str) -> None:
    """All rows of one variant, whose kinds alone the kernel is made for."""
    tokens = [0, 7, 8, 15, 16, *range(VOCABULARY - 14, VOCABULARY + KINDS[name].get("extra", 0))]
    check([KINDS[name]], rows([1] * len(tokens)), 40, DTYPES[1], tokens=tokens)


def test_many_replaced_rows() -> None:
    """More than one stretch of indices, each of several."""
    tokens = [*range(0, 5000, 501), 4999]
    check([{"rows": 3000}], rows([1] * len(tokens)), 16, DTYPES[0], tokens=tokens, vocabulary=5000)


def test_wider_residual() -> None:
    check([{"signs": 1}], rows([0, 1]), 100, torch.float16, out_dtype=torch.float32)


def check(
    specs: list[Spec], batch: Rows, inputs: int, dtype: torch.dtype, *, tokens: list[int] | None = None,
    vocabulary: int = VOCABULARY, out_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    gen, count = torch.Generator().manual_seed(inputs), batch.entry_T.shape[0]
    target = Target(1, vocabulary, inputs)
    made = world([Target(0, 16, 8), target], specs, dtype)
    weight = torch.randn(vocabulary, inputs, generator=gen).to(dtype)
    wholes = [merged(weight, [(0, d) for d in made.meaning.get((e, 1), [])]) for e in range(len(specs) + 1)]
    sizes = torch.tensor([len(wholes[e]) for e in batch.entry_T.tolist()])
    tokens_T = (torch.rand(count, generator=gen) * sizes).int() if tokens is None else torch.tensor(tokens).int()
    expected = torch.stack([wholes[e][t] for e, t in zip(batch.entry_T.tolist(), tokens_T.tolist(), strict=True)])
    # Every other row's token comes from the last step, in another order; what stands in `tokens` must not count.
    sampled_S = tokens_T.flip(0).contiguous()
    source_T = torch.where(torch.arange(count) % 2 == 0, count - 1 - torch.arange(count), -1).int()
    given_T = torch.where(source_T >= 0, torch.iinfo(torch.int32).max, tokens_T)
    out = poisoned((count, inputs), out_dtype or dtype)
    embed(
        *(t.to(DEVICE) for t in (given_T, source_T, sampled_S, weight)), target, made.deltas, batch.entry_T, out,
        made.kinds(),
    )  # fmt: skip
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().float(), expected, rtol=eps, atol=eps)
