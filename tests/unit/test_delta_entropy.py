"""Entropy coding: what goes in comes out, at the entropy's price, and nothing else is accepted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitdelta_core.delta import entropy, rans
from bitdelta_core.delta.entropy import BadCode

CPU = torch.device("cpu")


def drawn(rows: int, length: int, spread: float, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) * spread
    return noise.round().clamp(-127, 127).to(torch.int8)


def test_tables_add_up_and_follow_the_gaussian() -> None:
    counts = entropy.frequencies()
    assert (counts.sum(1) == 65536).all()
    assert (counts == counts[:, ::-1]).all()
    assert (np.diff(counts[:, 128:].astype(int), axis=1) <= 0).all(), "larger values are rarer"
    for c in (5, 12, 20):
        spread = 0.24 * 2 ** (c / 5)
        assert counts[c, 128] / counts[c, 127] == pytest.approx(math.exp(-1 / (2 * spread**2)), rel=0.05)


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.7, 3.0, 40.0])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (40, 1001)])
def test_round_trip_at_the_price_foretold(rows: int, length: int, spread: float) -> None:
    q = drawn(rows, length, spread)
    classes, bits = entropy.best_classes(q)
    per_symbol = classes.repeat_interleave(length).numpy()
    code = entropy.encode(q.flatten().numpy(), per_symbol)
    assert torch.equal(torch.from_numpy(entropy.decode(np.frombuffer(code, np.uint8), per_symbol)).view(q.shape), q)
    flush = 4 * entropy.lanes_of(q.numel())
    assert len(code) <= bits.sum() / 8 * 1.002 + flush + 2


@pytest.mark.parametrize("spread", [0.3, 0.6, 1.5, 10.0])
def test_the_price_is_near_the_entropy(spread: float) -> None:
    q = drawn(1, 100_000, spread)
    shares = torch.bincount(q.flatten().long() + 127).double() / q.numel()
    entropy_bits = -(shares[shares > 0] * shares[shares > 0].log2()).sum().item()
    assert entropy.best_classes(q)[1].item() / q.numel() <= entropy_bits * 1.03 + 0.002


def test_many_lanes_and_rows_of_different_spread() -> None:
    q = torch.cat([drawn(1, 50_000, s, seed) for seed, s in enumerate((0.3, 2.0, 30.0))])
    classes = entropy.best_classes(q)[0].repeat_interleave(50_000).numpy()
    assert entropy.lanes_of(150_000) == 32
    code = np.frombuffer(entropy.encode(q.flatten().numpy(), classes), np.uint8)
    assert (entropy.decode(code, classes) == q.flatten().numpy()).all()


def test_codes_that_are_none() -> None:
    q = drawn(4, 3000, 1.0)
    classes = entropy.best_classes(q)[0].repeat_interleave(3000).numpy()
    code = np.frombuffer(entropy.encode(q.flatten().numpy(), classes), np.uint8)
    changed = code.copy()
    changed[100] ^= 1
    for bad in (code[:-2], code[:-1], code[:3], np.append(code, [0, 0]).astype(np.uint8), changed):
        with pytest.raises(BadCode):
            entropy.decode(bad, classes)
    with pytest.raises(BadCode):
        entropy.decode(code, np.full_like(classes, 99))


def several() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Matrices of one lane, of a few and of many, and of lanes that the last step does not fill."""
    found = []
    for rows, length, spread in ((1, 1, 0.3), (7, 30, 2.0), (40, 384, 0.3), (90, 1001, 1.0), (3, 3000, 20.0)):
        q = drawn(rows, length, spread, seed=length)
        found.append((q.flatten(), entropy.best_classes(q)[0].repeat_interleave(length)))
    return found


def by_numpy(items: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    found = entropy.decode_together([(code.numpy(), classes.numpy()) for code, classes in items])
    return [torch.from_numpy(values) for values in found]


WAYS = {"torch": lambda items: rans.decode(items, CPU), "numpy": by_numpy}


@pytest.mark.parametrize("way", WAYS)
def test_many_at_once_have_the_same_codes(way: str) -> None:
    items = several()
    codes = rans.encode(items, CPU)
    for (values, classes), code in zip(items, codes, strict=True):
        assert code.numpy().tobytes() == entropy.encode(values.numpy(), classes.numpy())
    decoded = WAYS[way]([(code, classes) for code, (_, classes) in zip(codes, items, strict=True)])
    assert all(torch.equal(found, values) for found, (values, _) in zip(decoded, items, strict=True))
    assert rans.encode([], CPU) == WAYS[way]([]) == []


@pytest.mark.parametrize("way", WAYS)
def test_one_bad_code_among_many_is_found(way: str) -> None:
    items = several()
    codes = rans.encode(items, CPU)
    changed, past = codes[3].clone(), torch.cat([codes[3], codes[3][-2:]])
    changed[100] ^= 1
    for bad in (codes[3][:-2], codes[3][:3], changed, past):
        stored = [(bad if i == 3 else code, items[i][1]) for i, code in enumerate(codes)]
        with pytest.raises(BadCode):
            WAYS[way](stored)
    with pytest.raises(BadCode):
        WAYS[way]([(codes[3], torch.full_like(items[3][1], 99))])
