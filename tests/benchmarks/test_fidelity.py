"""The fidelity benchmark: what is drawn, how answers are judged, and how results become tables and curves."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fidelity import gain_kept
from fidelity_plot import LOWEST, curves
from fidelity_table import Models, bases, details, gains, quantised
from fidelity_tasks import Judge, Sample, Score, Task, draws, summed

VOCABULARY = 11


class Parrot:
    """Predicts, after each token, the token that `after` says, with this confidence."""

    def __init__(self, after: dict[int, int], confidence: float = 30.0) -> None:
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.after = after
        self.confidence = confidence

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        assert input_ids.shape == attention_mask.shape
        after = torch.tensor([self.after.get(i, 0) for i in range(VOCABULARY)])
        chosen = torch.nn.functional.one_hot(after[input_ids], VOCABULARY)
        return SimpleNamespace(logits=self.confidence * chosen.float())


SAMPLES = [Sample([5, 6, 7, 1], 2), Sample([5, 7, 1], 1), Sample([8, 9], 1)]
COUNTING = {5: 6, 6: 7, 7: 1, 8: 9}
"""Right on the first sample and the third; on the second it says 6 after 5, and is right after 7."""


def test_an_answer_counts_only_if_every_token_and_the_end_are_right() -> None:
    judge = Judge(Task("t", SAMPLES, exact=True), "cpu", None)
    figures = judge.figures(Parrot(COUNTING), range(3))
    assert figures[:, 4].tolist() == [1, 0, 1]
    assert figures[:, 3].tolist() == [2, 2, 1]
    assert figures[:, 0].tolist() == pytest.approx([0, 30, 0], abs=1e-3)
    assert Judge(Task("t", SAMPLES, True), "cpu", None).figures(Parrot({**COUNTING, 7: 2}), [0])[0, 4] == 0


def test_figures_against_the_fine_tune() -> None:
    judge = Judge(Task("t", SAMPLES, exact=True), "cpu", Parrot(COUNTING))
    same, other = (judge.figures(Parrot(after), range(3)) for after in (COUNTING, {**COUNTING, 7: 2}))
    assert summed(same, range(3), exact=True) == Score(pytest.approx(2 / 3), pytest.approx(6.0, abs=1e-3), 0.0, 1.0)
    assert summed(other, range(3), exact=True).top1 == pytest.approx(3 / 5)
    assert summed(other, range(3), exact=True).kl == pytest.approx(2 * 30 / 5, rel=1e-3)
    assert summed(other, [2], exact=False) == Score(None, pytest.approx(0, abs=1e-3), 0.0, 1.0)


def test_without_a_fine_tune_there_is_no_distance() -> None:
    figures = Judge(Task("t", SAMPLES, exact=False), "cpu", None).figures(Parrot(COUNTING), [0])
    assert summed(figures, [0], exact=False).kl is None
    assert figures[1].isnan().all()


def test_draws_are_the_same_every_time_and_differ_by_seed() -> None:
    rows = [["p", "a"]] * 50
    one = draws("t", rows, (20, 5, 2), 3)
    assert one == draws("t", rows, (20, 5, 2), 3)
    assert [len(set(draw)) for draw in one] == [20, 20, 20]
    assert one[0] != one[1]
    assert [len(draw) for draw in draws("t", rows[:8], (20, 5, 2), 2)] == [8, 8]
    assert len(draws("t", [{"messages": [], "answer": ""}] * 9, (20, 5, 2), 1)[0]) == 5
    texts = ["x" * n for n in range(30)]
    assert all(i >= 24 for draw in draws("text", texts, (20, 5, 2), 9) for i in draw), "windows of short documents"


def test_gain_is_between_base_and_fine_tune_in_the_metric_of_the_task() -> None:
    base, half, fine = (Score(e, n) for e, n in ((0.0, 4.0), (0.4, 2.0), (0.8, 1.0)))
    assert gain_kept(Task("t", [], exact=True), half, base, fine) == pytest.approx(0.5)
    assert gain_kept(Task("t", [], exact=False), half, base, fine) == pytest.approx(2 / 3)
    assert gain_kept(Task("t", [], exact=True), half, fine, fine) is None


def record(finetune: str, way: dict[str, Any], seed: int, gain: float, parameters: int = 10**6) -> str:
    sizes = {"nbytes": 1000, "ratio": 10.0, "linear_bits_per_weight": way.get("budget", 1.0)}
    score = {"exact_match": gain, "nats": 1.0, "kl": 0.5, "top1": 0.9}
    head = {"finetune": finetune, "metric": "exact_match", "way": way, "seed": seed, "base_parameters": parameters}
    return json.dumps({**head, **sizes, "score": score, "gain_kept": gain})


@pytest.fixture
def results() -> list[str]:
    auto, dare = {"codec": "auto", "budget": 0.5}, {"codec": "dare", "budget": 0.5}
    lines = [record("a", auto, 0, 0.1), record("a", auto, 0, 0.9), record("a", auto, 1, 0.8), record("b", auto, 0, 0.6)]
    lines += [record("b", auto, 1, 0.5), record("a", dare, 0, -9.0), record("a", dare, 1, 0.3)]
    lines += [record("b", dare, 0, 0.2), record("b", dare, 1, 0.2)]
    lines += [record("c", dare, 0, 1.0), record("c", {"codec": "lora"}, 0, 1.0)]
    lines.append(json.dumps({**json.loads(record("a", auto, 0, 0.2)), "label": "again"}))
    return [*lines, record("a", {**auto, "base": "int4"}, 0, 0.4), record("z", auto, 0, 1.0, parameters=10**8)]


def test_tables_show_means_spreads_and_the_worst_without_adapters(results: list[str]) -> None:
    found = bases(results)
    assert list(found) == [Models(10**6), Models(10**6, "again"), Models(10**8)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gains(found[Models(10**6)]).splitlines()]
    assert rows[0] == ["way", "bits per weight", "times smaller", "a", "b", "c", "mean", "worst"]
    by_way = {row[0]: row[1:] for row in rows[2:]}
    assert by_way["auto 0.5 bits"] == ["0.50", "10.0", "0.850 ± 0.050", "0.550 ± 0.050", "", "0.700", "0.550"]
    assert by_way["DARE 0.5 bits"][4] == "1.000"
    assert "| int4 | auto 0.5 bits | 0.400 |" in (quantised(found[Models(10**6)]) or "")
    assert quantised(found[Models(10**8)]) is None
    assert "| auto 0.5 bits |  | 1,000 | 10.00 | 0.500 | 0.850 ± 0.050 |" in details(found[Models(10**6)]["a"])


def test_curves_are_of_full_fine_tunes_with_the_spread_of_seeds(results: list[str]) -> None:
    found = curves(bases(results)[Models(10**6)])
    assert set(found) == {"auto", "DARE, seeded"}
    auto = found["auto"]
    assert auto.points[0] == pytest.approx((0.5, 0.7))
    assert auto.worst[0] == pytest.approx(0.55)
    assert auto.spread[0] == pytest.approx((0.65, 0.75))
    assert found["DARE, seeded"].worst[0] == LOWEST
