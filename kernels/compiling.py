"""Compiling several kernels at a time. One after the other, a start of a 7B on a new machine takes minutes for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction


@contextmanager
def together(workers: int) -> Iterator[None]:
    """Inside, launches of this thread start nothing: missing kernels are compiled (or read from the cache on disk),
    so many at a time. Afterwards they are there, and the same launches start at once.

    What is no Triton kernel runs as ever, on whatever is in memory. Other threads launch as ever.

    Raises:
        what the compiler raises for any of them, at the end.
    """
    here, run = threading.get_ident(), JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        mine = threading.get_ident() == here
        return run(self, *args, **{**kwargs, "warmup": True} if mine else kwargs)

    with ThreadPoolExecutor(workers, "compile") as pool, triton.AsyncCompileMode(pool):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run
