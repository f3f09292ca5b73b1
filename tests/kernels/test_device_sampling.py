"""The sampling kernels against their specification, token for token, and the specification against float64."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kernels.sampling import Impl, sample
from kernels.sampling.reference import ONE, scaled, weight
from kernels.sampling.rows import FRACTION, GREEDY, PER_TOKEN, RowValues, Sampled, SamplingRows, Wants, start_counts
from kernels.sampling.workspace import Config, Workspace, config_for
from tests.kernels.device_harness import DEVICE

ON_GPU = DEVICE.type == "cuda"
BATCHES, ROWS = (200, 24) if ON_GPU else (1, 8)
"""Of random rows. The interpreter takes a tenth of a second for a row."""
SMALL = Config(columns=64, listed=32, searched=64)
EVERYTHING = Wants()
SENTINEL = -77
WANTED = ("sampling", "Chip", "V=99")
PENALTIES = {"presence": (0.0, 1.0, -2.0), "frequency": (0.0, 0.3), "repetition": (1.0, 1.4, 0.6)}
CHOICES = {
    "temperature": (0.0, 0.05, 0.7, 1.0, 2.0, 1e-6),
    "top_k": (0, 1, 2, 5, 50, 10**6),
    "top_p": (1.0, 0.9, 0.5, 1e-9, 0.999),
    "min_p": (0.0, 0.0, 0.05, 1.0),
    "logprob": (False, True),
}


def random_values(rng: random.Random, vocab: int) -> RowValues:
    own = {name: rng.choice(values) for name, values in CHOICES.items()}
    if rng.random() < 0.5:
        own |= {name: rng.choice(values) for name, values in PENALTIES.items()}
    return RowValues(vocab=rng.choice((vocab, rng.randint(1, vocab))), **own)


def lines(values: Sequence[RowValues | None], uniform: Sequence[int]) -> SamplingRows:
    """None: a row that is left alone. Row i has row i of the counts."""
    rows = SamplingRows.empty(len(values), "cpu")
    for i, (v, u) in enumerate(zip(values, uniform, strict=True)):
        if v is not None:
            rows.fields_SF[i] = torch.frombuffer(bytearray(v.pack(u, i if v.penalised else -1)), dtype=torch.int32)
    return SamplingRows(rows.fields_SF.to(DEVICE))


def random_logits(rng: random.Random, rows: int, vocab: int, values: Sequence[RowValues | None]) -> torch.Tensor:
    """Coarse ones have many ties. What lies beyond a row's own vocabulary would win, or poison it."""
    gen = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(rows, vocab, generator=gen) * rng.choice((0.1, 3.0, 10.0))
    if rng.random() < 0.5:
        logits = (logits * 2).round() / 2
    for i, v in enumerate(values):
        if v is not None:
            logits[i, v.vocab :] = rng.choice((math.nan, math.inf, 100.0))
    return logits.to(DEVICE)


def run(
    impl: Impl, logits: torch.Tensor, rows: SamplingRows, counts: torch.Tensor | None, wants: Wants = EVERYTHING
) -> tuple[Sampled, torch.Tensor | None]:
    """Everything that may be written is poisoned before."""
    out = Sampled(torch.full((4, logits.shape[0]), SENTINEL, dtype=torch.int32, device=DEVICE))
    counts = None if counts is None else counts.clone()
    workspace = poisoned(logits.shape[0], logits.shape[1])
    sample(logits, rows, counts, out, workspace, wants, impl=impl)
    assert (workspace.tickets_SX == 0).all(), "not ready for the next launch"
    return out, counts


def poisoned(rows: int, vocab: int, config: Config = SMALL) -> Workspace:
    workspace = Workspace.empty(rows, vocab, DEVICE, config)
    for name in workspace.__slots__:
        if name not in ("config", "tickets_SX"):
            getattr(workspace, name).fill_(SENTINEL)
    return workspace


def check(logits: torch.Tensor, rows: SamplingRows, counts: torch.Tensor | None, wants: Wants = EVERYTHING) -> Sampled:
    """Both implementations give the same; returns it."""
    (expected, expected_counts), (found, found_counts) = (
        run(impl, logits, rows, counts, wants) for impl in ("reference", "triton")
    )
    torch.testing.assert_close(found.words_4S[:3], expected.words_4S[:3], rtol=0, atol=0)
    written = expected.words_4S[3] != SENTINEL
    assert torch.equal(found.words_4S[3] != SENTINEL, written)
    torch.testing.assert_close(found.logprob_S[written], expected.logprob_S[written], rtol=1e-4, atol=1e-5)
    if counts is not None and found_counts is not None and expected_counts is not None:
        assert torch.equal(found_counts, expected_counts)
    return found


@pytest.mark.parametrize("vocab", [1, 37, 131])
def test_kernels_draw_what_the_specification_draws(vocab: int) -> None:
    rng = random.Random(vocab)
    for _ in range(BATCHES):
        values = [random_values(rng, vocab) if rng.random() < 0.9 else None for _ in range(ROWS)]
        rows = lines(values, [rng.choice((rng.getrandbits(FRACTION), 0, 2**FRACTION - 1)) for _ in values])
        counts = torch.randint(0, 6, (ROWS, vocab + 3), dtype=torch.int32, device=DEVICE)
        found = check(random_logits(rng, ROWS, vocab, values), rows, counts)
        alone = torch.tensor([v is None for v in values], device=DEVICE)
        assert (found.words_4S[:, alone] == SENTINEL).all(), "wrote a row that is to be left alone"
        assert (found.finite_S[~alone] == 1).all()


def test_every_pair_of_truncations() -> None:
    """Also those that cancel: top-k beyond what min-p leaves, top-p of what top-k leaves."""
    rng, vocab = random.Random(5), 64
    pairs = itertools.product((3, 30), (0.3, 0.95), (0.0, 0.2))
    values = [RowValues(vocab=vocab, top_k=k, top_p=p, min_p=m, temperature=1.5) for k, p, m in pairs]
    logits = random_logits(rng, len(values), vocab, values)
    check(logits, lines(values, [rng.getrandbits(FRACTION) for _ in values]), None)


def test_the_default_cut_of_rows() -> None:
    """Several slices, lists and histogram as they are served."""
    rng, vocab = random.Random(6), 3001
    values = [RowValues(vocab=vocab, top_p=0.8), RowValues(vocab=vocab - 1, top_k=40), RowValues(vocab=vocab)]
    logits = random_logits(rng, 3, vocab, values)
    rows = lines(values, [rng.getrandbits(FRACTION) for _ in values])
    expected, _ = run("reference", logits, rows, None)
    found = Sampled.empty(3, DEVICE)
    workspace = poisoned(3, vocab, Config())
    for _ in range(2):  # a graph is replayed on the same memory
        found.words_4S.fill_(SENTINEL)
        sample(logits, rows, None, found, workspace, Wants(), impl="triton")
        assert torch.equal(found.token_S, expected.token_S)


def test_ties_are_taken_by_lowest_id() -> None:
    """Equal logits, -0 and 0 among them, more of them than the list takes."""
    vocab = 90
    logits = torch.zeros(4, vocab, device=DEVICE)
    logits[:, 1::2] = -0.0
    values = [
        RowValues(vocab=vocab, temperature=0),
        RowValues(vocab=vocab, top_k=40),
        RowValues(vocab=vocab, top_p=0.5),
        RowValues(vocab=vocab, top_k=50, top_p=0.5),
    ]
    assert check(logits, lines(values, [2**FRACTION - 1] * 4), None).token_S.tolist() == [0, 39, 44, 24]
    assert check(logits, lines(values, [0] * 4), None).token_S.tolist() == [0, 0, 0, 0]


def test_what_leaves_one_token_leaves_the_best() -> None:
    rng, vocab = random.Random(7), 50
    values = [
        RowValues(vocab=vocab, temperature=2.0, top_k=1),
        RowValues(vocab=vocab, temperature=2.0, top_p=1e-12),
        RowValues(vocab=vocab, temperature=2.0, min_p=1.0),
        RowValues(vocab=vocab, temperature=1e-9),
    ]
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = check(logits, lines(values, [rng.getrandbits(FRACTION) for _ in values]), None)
    assert found.token_S.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_says_so_and_harms_no_other(poison: float) -> None:
    vocab = 70
    values = [RowValues(vocab=vocab, temperature=t, presence=1.0, logprob=True) for t in (0.0, 1.0, 0.0, 1.0)]
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    logits[:2, (slice(None) if poison == -math.inf else 66)] = poison
    counts = torch.zeros(4, vocab, dtype=torch.int32, device=DEVICE)
    found = check(logits, lines(values, [2**30] * 4), counts)
    assert found.finite_S.tolist() == [0, 0, 1, 1]
    assert found.token_S.tolist()[:2] == [0, 0]


def test_some_tokens_may_be_excluded() -> None:
    """-inf among finite logits is a token that cannot be drawn."""
    values = [RowValues(vocab=40, temperature=2.0, repetition=1.3), RowValues(vocab=40, temperature=0, logprob=True)]
    logits = torch.full((2, 40), -math.inf, device=DEVICE)
    logits[:, 33:36] = 1.0
    found = check(logits, lines(values, [2**31 - 1] * 2), torch.ones(2, 40, dtype=torch.int32, device=DEVICE))
    assert found.token_S.tolist() == [35, 33]
    assert found.logprob_S[1].item() == pytest.approx(-math.log(3), abs=1e-5)


def test_rows_that_want_more_than_the_graph_get_no_token() -> None:
    values = [
        RowValues(vocab=20, temperature=0),
        RowValues(vocab=20),
        RowValues(vocab=20, top_k=3),
        RowValues(vocab=20, logprob=True),
    ]
    logits, rows = torch.randn(4, 20, device=DEVICE), lines(values, [5] * 4)
    for wants, finite in (
        (GREEDY, [1, 0, 0, 0]),
        (Wants(truncated=False, ranks=False), [1, 1, 0, 0]),
        (Wants(ranks=False), [1, 1, 1, 0]),
        (Wants(truncated=False), [1, 1, 0, 1]),
    ):
        found, _ = run("triton", logits, rows, None, wants)
        assert found.finite_S.tolist() == finite
        assert all(v.wants | wants == wants for v, ok in zip(values, finite, strict=True) if ok)


def test_a_row_does_not_depend_on_its_neighbours_or_on_how_rows_are_cut() -> None:
    rng, vocab = random.Random(8), 100
    values = [replace(random_values(rng, vocab), top_k=k) for k in (0, 5, 1, 0)]
    uniform = [rng.getrandbits(FRACTION) for _ in values]
    logits, counts = random_logits(rng, 4, vocab, values), torch.randint(0, 4, (4, vocab), device=DEVICE).int()
    together, _ = run("triton", logits, lines(values, uniform), counts)
    order = [3, 0, 2, 1]
    mixed = [v for i in order for v in (None, values[i])]
    workspace = poisoned(8, 2 * vocab, Config(columns=32, listed=256, searched=128))
    wide = torch.full((8, 2 * vocab), math.nan, device=DEVICE)
    wide[1::2, :vocab] = logits[order]
    found = Sampled(torch.full((4, 8), SENTINEL, dtype=torch.int32, device=DEVICE))
    spread = torch.zeros(8, 2 * vocab, dtype=torch.int32, device=DEVICE)
    spread[1::2, :vocab] = counts[order]
    rows = lines(mixed, [u for i in order for u in (0, uniform[i])])
    sample(wide, rows, spread, found, workspace, Wants(), impl="triton")
    assert torch.equal(found.words_4S[:3, 1::2], together.words_4S[:3, order])
    assert (found.words_4S[:, ::2] == SENTINEL).all()


def test_counts_follow_the_tokens() -> None:
    """Steps on the device and a table that is started anew from prompt and output give the same."""
    vocab, steps = 33, 5
    values = [RowValues(vocab=vocab, temperature=0.9, frequency=0.8, presence=0.4, repetition=1.2)] * 2
    prompts = [torch.tensor([1, 1, 7]), torch.tensor([32])]
    counts = torch.full((2, vocab), SENTINEL, dtype=torch.int32, device=DEVICE)
    for i, prompt in enumerate(prompts):
        start_counts(counts, i, prompt.to(DEVICE), torch.tensor([], dtype=torch.int64, device=DEVICE))
    drawn: list[list[int]] = []
    gen = torch.Generator().manual_seed(3)
    for step in range(steps):
        logits = torch.randn(2, vocab, generator=gen).to(DEVICE)
        out, after = run("triton", logits, lines(values, [step * 2**28, 7]), counts)
        assert after is not None
        counts = after
        drawn.append(out.token_S.tolist())
    fresh = torch.empty_like(counts)
    for i, prompt in enumerate(prompts):
        start_counts(fresh, i, prompt.to(DEVICE), torch.tensor([tokens[i] for tokens in drawn], device=DEVICE))
    assert torch.equal(counts, fresh)
    assert counts.sum().item() == 2 * steps * PER_TOKEN + 3


def test_without_penalties_counts_are_not_touched() -> None:
    values = [RowValues(vocab=30), RowValues(vocab=30, temperature=0, logprob=True)]
    counts = torch.full((1, 30), SENTINEL, dtype=torch.int32, device=DEVICE)
    _, after = run("triton", torch.randn(2, 30, device=DEVICE), lines(values, [1, 2]), counts)
    assert after is not None
    assert (after == SENTINEL).all()


DISTRIBUTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
}


def probabilities(logits_V: torch.Tensor, values: RowValues) -> torch.Tensor:
    """As the papers define them, in float64, with a sort."""
    probs, order = torch.softmax(logits_V.double() / values.temperature, 0).sort(descending=True)
    probs[probs < values.min_p * probs[0]] = 0
    if values.top_k:
        probs[values.top_k :] = 0
    probs /= probs.sum()
    probs[probs.cumsum(0) - probs >= values.top_p] = 0
    return torch.zeros_like(probs).scatter_(0, order, probs / probs.sum())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_specification_has_the_right_distribution(name: str) -> None:
    """Chi-square at fixed seeds; and with evenly spaced random numbers each token as often as its probability says."""
    vocab, draws = 23, 3000
    values = replace(RowValues(vocab=vocab), **DISTRIBUTIONS[name])
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(11))
    expected = draws * probabilities(logits, values)
    rng = random.Random(name)
    even = [(2 * i + 1) * 2 ** (FRACTION - 1) // draws for i in range(draws)]
    for uniform in (even, [rng.getrandbits(FRACTION) for _ in range(draws)]):
        out = Sampled.empty(draws, DEVICE)
        rows = lines([values] * draws, uniform)
        sample(logits.expand(draws, -1).to(DEVICE), rows, None, out, None, Wants(), impl="reference")
        found = out.token_S.cpu().long().bincount(minlength=vocab).double()
        if uniform is even:
            assert ((found - expected).abs() <= 1).all()
        kept = expected > 0
        assert (found[~kept] == 0).all(), "drew a token that was excluded"
        square = ((found - expected)[kept] ** 2 / expected[kept]).sum().item()
        freedom = max(1, int(kept.sum()) - 1)
        assert square < freedom + 5 * math.sqrt(2 * freedom)


def test_weights_are_those_of_float64() -> None:
    octaves = torch.cat([torch.linspace(0, ONE, 40001), torch.linspace(0, 1, 20001), torch.tensor([1e-42, math.inf])])
    found, exact = weight(octaves).double(), 2.0 ** (ONE - octaves.double())
    assert found[0] == 2.0**ONE
    assert found[-1] == 0
    assert ((found - exact).abs() <= 2e-7 * exact + 1).all()


def test_shares_are_exact_in_64_bits() -> None:
    rng = random.Random(9)
    for _ in range(200):
        mass, numerator = rng.getrandbits(rng.randint(1, 62)), rng.getrandbits(FRACTION)
        for up in (False, True):
            found = scaled(torch.tensor(numerator, dtype=torch.int32), torch.tensor(mass), up=up).item()
            assert found == (-(-numerator * mass // 2**FRACTION) if up else numerator * mass // 2**FRACTION)


def test_a_measured_configuration_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Chip")
    monkeypatch.setattr(
        "kernels.configs.lookup", lambda op, name, key: {"columns": 512} if (op, name, key) == WANTED else None
    )
    chip = torch.device("cuda", 0)
    assert config_for(99, chip) == Config(columns=512)
    assert config_for(98, chip) == config_for(99, torch.device("cpu")) == Config()


def test_a_share_that_rounds_to_all_is_all() -> None:
    assert RowValues(vocab=9, top_p=0.9999999999).pack(0) == RowValues(vocab=9).pack(0)
    assert RowValues(vocab=9, top_p=0.999999).pack(0) != RowValues(vocab=9).pack(0)
