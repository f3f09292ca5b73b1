"""Counting what is compiled."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from triton import knobs

from bitdelta_core.engine import compilations
from bitdelta_core.engine.compilations import Compilations


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What another listener, there before, is told."""
    seen: list[bool] = []
    monkeypatch.setattr(compilations, "_count", None)
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: seen.append(cache_hit))
    compilations.watch()
    compilations.watch()
    return seen


def compiled(seconds: float, *, cache_hit: bool = False) -> None:
    listener: Any = knobs.compilation.listener
    listener(
        src=SimpleNamespace(name="flat_kernel"), metadata={}, metadata_group={},
        times=SimpleNamespace(total=1e6 * seconds), cache_hit=cache_hit,
    )  # fmt: skip


def test_what_is_compiled_is_counted_and_what_is_read_from_disk_is_not(told: list[bool]) -> None:
    for seconds, hit in ((2.0, False), (0.1, True), (1.5, False)):
        compiled(seconds, cache_hit=hit)
    assert compilations.compilations() == Compilations(2, 3.5)
    assert told == [False, True, False], "who listened before is told too, once"


def test_only_what_is_compiled_while_serving_is_warned_of(told: list[bool], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bitdelta_core"):
        compiled(1.0)
        assert caplog.messages == []
        compilations.expect(False)
        compiled(2.9)
    assert caplog.messages == ["flat_kernel was compiled while serving, which took 2.90 s"]


def test_nothing_is_counted_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations, "_count", None)
    compilations.expect(True)
    assert compilations.compilations() == Compilations()
