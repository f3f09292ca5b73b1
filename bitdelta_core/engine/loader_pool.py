"""Threads that fetch and load deltas."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from bitdelta_core.engine.passing import run_in_passing_thread

CLOSE_S = 0.5
"""How long closing waits for loader threads; one whose source never answers is left behind."""


class LoaderPool:
    """Daemon threads: a source that never returns keeps nobody from exiting."""

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Idle threads have ended afterwards: one still on its way out when the interpreter ends aborts the process.
        Jobs that nobody has begun are dropped."""
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        """Each job in a thread of its own: see `run_in_passing_thread`."""
        while (job := self._jobs.get()) is not None:
            run_in_passing_thread(job)
