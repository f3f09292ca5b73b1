"""Streams of a replica share what may be sent, and send together."""

from __future__ import annotations

import pytest

from deployments import pace
from deployments.pace import LONGEST_S, Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.004]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_the_more_streams_the_rarer_each_one_sends(clock: list[float]) -> None:
    one = Pace(100)
    assert one.pause() == 0
    with one.stream():
        assert one.pause() == pytest.approx(0.006)
        with one.stream(), one.stream():
            assert one.pause() == pytest.approx(0.026)
        with pytest.raises(KeyError), one.stream():
            raise KeyError
        assert one.streams == 1
    assert one.streams == 0


def test_they_send_at_the_same_moments(clock: list[float]) -> None:
    one, ends = Pace(400), set()
    with one.stream(), one.stream():
        for at in range(50):
            clock[0] = 0.004 + at * 0.0001
            ends.add(round(clock[0] + one.pause(), 6))
    assert len(ends) <= 2  # 5 ms of time, 5 ms between messages


def test_no_token_waits_long(clock: list[float]) -> None:
    one = Pace(1)
    with one.stream(), one.stream():
        assert 0 < one.pause() <= LONGEST_S


def test_no_limit() -> None:
    one = Pace(0)
    with one.stream():
        assert one.pause() == 0
