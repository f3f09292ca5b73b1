"""What the search for fast linears times: never without the rule's choice, nor its parts joined with the best found."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from kernels.delta_linear.choice import Config, rule
from kernels.device import Target

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGET = Target(0, 22016, 4096, (0, 11008))


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tune")


def times(found: list[Config], slow: Config) -> dict[Config, float]:
    """As measured somewhere: later ones are faster, `slow` is the slowest."""
    return {config: 1000.0 if config == slow else 100.0 - i for i, config in enumerate(found)}


@pytest.mark.parametrize("rows", [1, 4, 16, 32])
def test_the_rule_is_timed_and_joined_with_the_best(tune: Any, rows: int) -> None:
    search = tune.Search("", "gate_up", TARGET, rows)
    ours = rule(TARGET, rows, search.signs.kinds, b1=True)
    first = search.first(search.signs)
    assert first[0] == ours
    assert all(c == tune.joined(ours, c, rows) for c in first), "sign products are compared beside the same base tiles"
    base, signs = times(search.first(search.base), ours), times(first, ours)
    tile, best = list(base)[-1], list(signs)[-1]
    second = search.second(base, signs)
    assert {tune.joined(tile, ours, rows), tune.joined(tile, best, rows)} <= set(second)
    assert {c.impl for c in second} == {"flat", "signs"}
    assert not set(second) & set(signs), "nothing is timed twice"


@pytest.mark.parametrize("rows", [64, 256])
def test_many_rows(tune: Any, rows: int) -> None:
    search = tune.Search("", "gate_up", TARGET, rows)
    first = search.first(search.signs)
    assert first[0] == rule(TARGET, rows, search.signs.kinds, b1=True)
    assert {c.impl for c in first} == ({"signs", "flat"} if rows == 64 else {"signs"})
    tiles = search.first(search.base)
    second = search.second(times(tiles, first[0]), times(first, first[0]))
    assert bool(second) == (rows == 64)
    assert not set(second) & set(first)


def test_the_fastest_of_everything_timed_is_filed(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that either part alone would not have led to."""
    search = tune.Search("", "gate_up", TARGET, 16)
    ours = rule(TARGET, 16, search.signs.kinds, b1=True)
    hidden = tune.joined(search.first(search.base)[-1], ours, 16)
    assert hidden not in search.first(search.signs)
    monkeypatch.setattr(tune.gpu_timing, "graph_us", lambda calls: 500.0)
    found = tune.searched(None, search, FakeTimer(search, hidden))
    assert found == {
        "22016x4096 16 single": tune.settings(hidden),
        "22016x4096 16 base": tune.settings(search.first(search.base)[-1]),
    }


class FakeTimer:
    """Runs are cases' stand-ins. Base tiles are the faster the later they are tried; of signs one is the fastest."""

    def __init__(self, search: Any, fastest: Config) -> None:
        self.base, self.signs, self.fastest = FakeRun(search.base), FakeRun(search.signs), fastest

    def __call__(self, run: FakeRun, found: list[Config]) -> dict[Config, float]:
        if run is self.base:
            return {config: 100.0 - i for i, config in enumerate(found)}
        return {config: 10.0 if config == self.fastest else 20.0 for config in found}

    def show(self, *shown: object) -> None: ...


class FakeRun:
    def __init__(self, case: Any) -> None:
        self.case = case

    def cublas(self) -> list[Any]:
        return []
