"""Work that must not leave OpenMP threads behind.

Every thread that runs a parallel torch operation on the CPU gets a team of OpenMP threads, which lives as long as the
thread. When all teams together have more threads than there are cores, GNU's OpenMP stops spinning between operations
and sleeps, which made small products two to three times slower (docs/log.md). So the engine's thread has the only
lasting team, and everything else that computes does so in a thread that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def call_in_passing_thread(function: Callable[[], T]) -> T:
    """The function's result, or its exception."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()


def run_in_passing_thread(job: Callable[[], None]) -> None:
    """Run a job that neither returns nor raises. A job that never ends keeps no process from exiting."""
    thread = threading.Thread(target=job, name=f"{threading.current_thread().name}-job", daemon=True)
    thread.start()
    thread.join()
