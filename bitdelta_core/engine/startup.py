"""How long each stage of an engine's start took."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Stages:
    """A clock that is read at the end of every stage; the first begins when it is made."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def ended(self, name: str) -> None:
        """What was done since the last stage was `name`."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    @property
    def seconds(self) -> Mapping[str, float]:
        """By stage, in order."""
        return dict(self._seconds)

    def line(self) -> str:
        """For humans."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._seconds.items())
        return f"started in {sum(self._seconds.values()):.1f} s: {parts}"
