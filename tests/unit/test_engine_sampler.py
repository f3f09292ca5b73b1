"""The sampler against transformers' logits processors, and its independence of the batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bitdelta_core.engine.api import SamplingParams
from bitdelta_core.engine.sampler import Row, RowState, logprob_rows, sample, table
from kernels.sampling import Impl
from kernels.sampling import sample as kernel_sample
from kernels.sampling.rows import FRACTION, Sampled, SamplingRows, Wants, start_counts
from kernels.sampling.workspace import Workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 41
PROMPT = (3, 5, 5, 7)


def row(params: SamplingParams, *, seed: int = 0, generated: tuple[int, ...] = (), index: int = 0) -> Row:
    state = RowState(params, prompt=PROMPT, vocab_size=VOCAB, stop_ids=frozenset({2}), seed=seed, index=index)
    return Row(state, generated, len(PROMPT) + len(generated))


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def frequencies(params: SamplingParams, one: torch.Tensor, draws: int = 6000) -> torch.Tensor:
    rows = [row(params, seed=seed) for seed in range(draws)]
    counts = Counter(s.token_id for s in sample(one.expand(draws, -1).clone(), rows))
    return torch.tensor([counts[i] / draws for i in range(VOCAB)])


def test_greedy_rows_take_the_best_token() -> None:
    given = logits(5)
    expected = given.argmax(dim=1).tolist()
    assert [s.token_id for s in sample(given, [row(SamplingParams(temperature=0))] * 5)] == expected


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        (SamplingParams(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (SamplingParams(top_k=4), [TopKLogitsWarper(4)]),
        (SamplingParams(top_p=0.8), [TopPLogitsWarper(0.8)]),
        (SamplingParams(min_p=0.1), [MinPLogitsWarper(0.1)]),
        (
            SamplingParams(temperature=1.5, top_k=9, top_p=0.7),
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(9), TopPLogitsWarper(0.7)],
        ),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all"],
)
def test_draws_follow_the_distribution_of_transformers(params: SamplingParams, warpers: list) -> None:
    one = logits(1, seed=4)
    scores = one.clone()
    for warper in warpers:
        scores = warper(torch.tensor([PROMPT]), scores)
    expected = torch.softmax(scores[0], dim=0)
    found = frequencies(params, one)
    assert (found[expected == 0] == 0).all(), "drew a token that was excluded"
    noise = 4.5 * (expected * (1 - expected) / 6000).sqrt() + 3 / 6000
    assert ((found - expected).abs() <= noise).all()


def test_a_row_does_not_depend_on_its_neighbours_or_on_the_order() -> None:
    given = logits(6, seed=1)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(temperature=0.8, presence_penalty=1.0, logprobs=2),
        SamplingParams(top_k=3),
        SamplingParams(temperature=0, repetition_penalty=1.4),
        SamplingParams(min_p=0.05, logit_bias={4: 2.0}),
    ]
    rows = [row(p, seed=i, generated=(5, 9)) for i, p in enumerate(params)]
    together = sample(given.clone(), rows)
    alone = [sample(given[i : i + 1].clone(), [row(p, seed=i, generated=(5, 9))])[0] for i, p in enumerate(params)]
    assert together == alone
    order = [4, 0, 5, 2, 1, 3]
    shuffled = sample(given[order].clone(), [row(params[i], seed=i, generated=(5, 9)) for i in order])
    assert shuffled == [together[i] for i in order]


def test_seed_choice_and_position_each_change_the_draw() -> None:
    state = RowState(SamplingParams(), prompt=PROMPT, vocab_size=VOCAB, stop_ids=frozenset(), seed=7, index=0)
    other_seed = RowState(SamplingParams(), prompt=PROMPT, vocab_size=VOCAB, stop_ids=frozenset(), seed=8, index=0)
    other_choice = RowState(SamplingParams(), prompt=PROMPT, vocab_size=VOCAB, stop_ids=frozenset(), seed=7, index=1)
    assert len({state.uniform(1), state.uniform(2), other_seed.uniform(1), other_choice.uniform(1)}) == 4
    assert state.uniform(1) == state.uniform(1)


def test_uniform_numbers_are_uniform() -> None:
    state = RowState(SamplingParams(), prompt=PROMPT, vocab_size=VOCAB, stop_ids=frozenset(), seed=-3, index=0)
    draws = torch.tensor([state.uniform(i) for i in range(4000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = torch.histc(draws, bins=10, min=0, max=1)
    assert ((histogram - 400).abs() < 5 * math.sqrt(400)).all()


def test_penalties_are_those_of_vllm_and_transformers() -> None:
    given, generated = logits(1, seed=2), (9, 9, 5)
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.7, logprobs=VOCAB
    )
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*PROMPT, *generated]]), given.clone())[0]
    expected[9] -= 2 * 0.3 + 0.5
    expected[5] -= 0.3 + 0.5
    [drawn] = sample(given.clone(), [row(params, generated=generated)])
    assert drawn.token_id == expected.argmax().item()
    assert drawn.logprobs is not None
    found = dict(drawn.logprobs.top)
    torch.testing.assert_close(
        torch.tensor([found[i] for i in range(VOCAB)]), torch.log_softmax(expected, dim=0), rtol=1e-5, atol=1e-5
    )


def test_counts_grow_with_the_sequence() -> None:
    """Step by step with one state gives what a fresh state gives: nothing is counted twice or missed."""
    params = SamplingParams(temperature=0, frequency_penalty=1.0, logprobs=3)
    state = RowState(params, prompt=PROMPT, vocab_size=VOCAB, stop_ids=frozenset(), seed=0, index=0)
    generated: list[int] = []
    for step in range(6):
        given = logits(1, seed=step)
        stepped = sample(given.clone(), [Row(state, generated, 4 + step)])
        assert stepped == sample(given.clone(), [row(params, generated=tuple(generated))])
        generated.append(stepped[0].token_id % 3)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_of_a_device_table_give_the_same_tokens(impl: Impl) -> None:
    """Counts that the kernels keep, against counts of what was generated; over several steps."""
    steps = 6 if impl == "reference" else 2
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.7, presence_penalty=0.2),
        SamplingParams(temperature=1.4, top_k=7, repetition_penalty=1.3, logprobs=0),
        SamplingParams(temperature=0, repetition_penalty=1.8),
    ]
    states = [row(p, seed=i).state for i, p in enumerate(params)]
    counts_QV = torch.empty(3, VOCAB, dtype=torch.int32, device=DEVICE)
    none = torch.tensor([], dtype=torch.int64, device=DEVICE)
    for i in range(3):
        start_counts(counts_QV, i, torch.tensor(PROMPT, device=DEVICE), none)
    out, workspace = Sampled.empty(3, DEVICE), Workspace.empty(3, VOCAB, DEVICE)
    generated: list[list[int]] = [[], [], []]
    for step in range(steps):
        given, position = logits(3, seed=step), len(PROMPT) + step
        lines = [s.values.pack(int(s.uniform(position) * 2**FRACTION), i) for i, s in enumerate(states)]
        kernel_sample(
            given.to(DEVICE), SamplingRows(table(lines, DEVICE)), counts_QV, out, workspace, Wants(), impl=impl
        )
        expected = sample(given, [Row(s, g, position) for s, g in zip(states, generated, strict=True)])
        assert out.token_S.tolist() == [e.token_id for e in expected]
        assert expected[1].logprobs is not None
        assert out.logprob_S[1].item() == pytest.approx(expected[1].logprobs.logprob, abs=1e-5)
        assert out.rank_S[1].item() == expected[1].logprobs.rank
        for tokens, drawn in zip(generated, expected, strict=True):
            tokens.append(drawn.token_id)


def test_logit_bias_and_min_tokens() -> None:
    given = logits(1)
    forced = SamplingParams(temperature=0, logit_bias={11: 100.0})
    assert sample(given.clone(), [row(forced)])[0].token_id == 11
    given[0, 2] = given[0, 8] = 50.0
    wait = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(8,))
    assert sample(given.clone(), [row(wait, generated=(1,))])[0].token_id not in (2, 8)
    assert sample(given.clone(), [row(wait, generated=(1, 1))])[0].token_id in (2, 8)


def test_logprobs_are_of_the_distribution_before_temperature() -> None:
    given = logits(2, seed=5)
    expected = torch.log_softmax(given, dim=1)
    drawn = sample(given.clone(), [row(SamplingParams(temperature=2.0, logprobs=3), seed=s) for s in (0, 1)])
    for i, one in enumerate(drawn):
        assert one.logprobs is not None
        values, ids = expected[i].topk(3)
        assert [token for token, _ in one.logprobs.top] == ids.tolist()
        assert [v for _, v in one.logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)
        assert one.logprobs.logprob == pytest.approx(expected[i, one.token_id].item(), abs=1e-5)
        assert one.logprobs.rank == 1 + int((expected[i] > expected[i, one.token_id]).sum())


def test_logprobs_of_given_tokens() -> None:
    given = logits(3)
    rows = logprob_rows(given, [4, 0, 40], top=0)
    assert [r.token_id for r in rows] == [4, 0, 40]
    assert rows[1].logprob == pytest.approx(torch.log_softmax(given[1], dim=0)[0].item(), abs=1e-5)
    assert rows[0].top == ()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_poisoned_row_is_marked_and_harms_no_other(poison: float, temperature: float) -> None:
    given = logits(3)
    clean = sample(given.clone(), [row(SamplingParams(temperature=temperature), seed=s) for s in range(3)])
    given[1, 6] = poison
    drawn = sample(given, [row(SamplingParams(temperature=temperature), seed=s) for s in range(3)])
    assert [s.finite for s in drawn] == [True, False, True]
    assert (drawn[0], drawn[2]) == (clean[0], clean[2])


def test_penalties_of_a_smaller_vocabulary_in_rows_of_changing_width() -> None:
    """The width follows the batch's largest vocabulary, which changes from step to step."""
    params = SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={40: 3.0}, min_tokens=9, logprobs=4)
    state = RowState(params, prompt=PROMPT, vocab_size=VOCAB, stop_ids=frozenset({2, 60}), seed=0, index=0)
    generated: list[int] = []
    for step, width in enumerate((VOCAB, 70, 55)):
        given = torch.full((1, width), float("-inf"))
        given[:, :VOCAB] = logits(1, seed=step)
        [padded] = sample(given, [Row(state, generated, 4 + step)])
        [plain] = sample(logits(1, seed=step), [row(params, generated=tuple(generated))])
        assert padded == plain
        generated.append(padded.token_id)


def test_a_smaller_vocabulary_is_padded_with_minus_infinity() -> None:
    given = logits(1)
    given[0, 20:] = float("-inf")
    rows = [row(SamplingParams(temperature=2.0), seed=s) for s in range(200)]
    assert max(s.token_id for s in sample(given.expand(200, -1).clone(), rows)) < 20
