"""What a start or a run should not have to wait for: kernels that are compiled, steps that are captured.

A figure in whose window a kernel was compiled says nothing of serving; so records carry these counts.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from triton import knobs

GRAPHS = logging.getLogger("bitdelta_core.engine.graphs")


class Watch(logging.Handler):
    """Counts since the process began, in all threads. Made once, before anything is compiled."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._counts: dict[str, float] = {"compiled": 0, "compile_s": 0.0, "from_cache": 0, "captured": 0}
        knobs.compilation.listener = self._compiled
        GRAPHS.addHandler(self)
        GRAPHS.setLevel(logging.INFO)
        GRAPHS.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("captured a step"):
            self._counts["captured"] += 1

    def _compiled(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        self._counts["from_cache" if cache_hit else "compiled"] += 1
        self._counts["compile_s"] += 0 if cache_hit else times.total / 1e6

    def counts(self) -> dict[str, float]:
        return dict(self._counts)

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """What was added to an earlier `counts()`."""
        return {name: round(value - before[name], 2) for name, value in self._counts.items()}


def process_age() -> float:
    """Seconds since this process was started: what imports took, when it is read after them."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
