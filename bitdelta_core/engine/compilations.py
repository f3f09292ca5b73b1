"""How many kernels this process has compiled. Each takes seconds, in which nobody gets a token.

So a start meets every kernel that it can foresee, and what is compiled later is counted and said aloud. Triton keeps
compiled kernels on disk (TRITON_CACHE_DIR): the next process reads them in milliseconds, which is not counted.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compilations:
    """Since the process began to count."""

    kernels: int = 0
    seconds: float = 0.0


class _Count:
    """What Triton tells its listener, from any thread."""

    def __init__(self, told_before: Any) -> None:
        self._told_before = told_before
        self._lock = threading.Lock()
        self.found = Compilations()
        self.expected = True

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        if self._told_before is not None:
            self._told_before(src=src, times=times, cache_hit=cache_hit, **rest)
        if cache_hit:
            return
        seconds = times.total / 1e6
        with self._lock:
            self.found = replace(self.found, kernels=self.found.kernels + 1, seconds=self.found.seconds + seconds)
        log.log(
            logging.INFO if self.expected else logging.WARNING,
            "%s was compiled%s, which took %.2f s",
            getattr(src, "name", "a kernel"),
            "" if self.expected else " while serving",
            seconds,
        )


_count: _Count | None = None


def watch() -> None:
    """Count from now on. A listener that Triton has already goes on being told."""
    global _count
    if _count is None:
        from triton import knobs

        _count = _Count(knobs.compilation.listener)
        knobs.compilation.listener = _count


def expect(expected: bool) -> None:
    """Whether a compilation is nothing to be warned of: during a start."""
    if _count is not None:
        _count.expected = expected


def compilations() -> Compilations:
    """So far; none where nobody counts."""
    return Compilations() if _count is None else _count.found
