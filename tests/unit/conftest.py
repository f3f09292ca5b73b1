"""Fixtures that several files share."""

from __future__ import annotations

import pytest

from tests.unit.engine_fakes import RUNNERS


@pytest.fixture(params=RUNNERS)
def every_runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The worlds of the test compute in one way after the other."""
    monkeypatch.setattr("tests.unit.engine_fakes.RUNNER", request.param)
    return request.param
