"""Where the files of a delta are: a directory that the caller added, or what a blocking `DeltaSource` fetches."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from bitdelta_core.errors import BitDeltaError, DeltaError, DeltaUnavailable

DeltaSource = Callable[[str], AbstractContextManager[Path]]
"""delta sha256 -> the directory of its verified files, which stays while the `with` block runs; what is mapped then may
be unlinked later. May block; called from threads, never from the loop. `contextlib.nullcontext(path)` if it never goes.
"""


def content_sha256(path: Path) -> str:
    """Identity of a delta directory: sha256 over the lines `sha256 nbytes name` of its files, sorted by name.

    The same that a published version of these files carries, so both share one copy in the slab and one prefix cache.
    """
    lines = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as body:
            digest = hashlib.file_digest(body, "sha256").hexdigest()
        lines.append(f"{digest} {file.stat().st_size} {file.relative_to(path).as_posix()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def as_delta_error(error: BaseException, delta: str) -> BitDeltaError:
    """What the requests that wanted `delta` are told."""
    if isinstance(error, DeltaError):
        error.delta = delta  # readers of files know only the directory
    if isinstance(error, BitDeltaError):
        return error
    told = DeltaUnavailable(f"the delta cannot be fetched: {type(error).__name__}: {error}", delta=delta)
    told.__cause__ = error
    return told


class DeltaFiles:
    """One call of the source at a time per sha256; a failure is remembered for a while, so that a broken store is not
    hammered."""

    def __init__(self, source: DeltaSource | None, *, retry_s: float) -> None:
        self._source = source
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._local: dict[str, Path] = {}
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._failed: dict[str, tuple[float, BitDeltaError]] = {}

    def add(self, path: Path) -> str:
        """Make a local delta directory servable. Returns its sha256."""
        sha256 = content_sha256(path)
        with self._lock:
            self._local[sha256] = path
        return sha256

    @contextmanager
    def held(self, delta: str) -> Iterator[Path]:
        """The delta's directory, there for the length of the block; entering blocks while it is being fetched.

        Raises:
            DeltaUnavailable: nobody has it, or the source failed now or within the retry interval.
            BitDeltaError: whatever else the source raised.
        """
        with self._lock:
            local = self._local.get(delta)
            turn = self._turns.setdefault(delta, threading.Lock())
        if local is not None:
            yield local
            return
        with ExitStack() as stack:
            with turn:  # who waited here finds it fetched, or the failure remembered
                path = self._enter(delta, stack)
            yield path

    def _enter(self, delta: str, stack: ExitStack) -> Path:
        failed_until, failure = self._failed.get(delta, (0.0, None))
        if failure is not None and time.monotonic() < failed_until:
            raise failure
        try:
            if self._source is None:
                raise DeltaUnavailable(
                    f"delta {delta} is unknown: add_delta() it, or give the engine a source", delta=delta
                )
            path = stack.enter_context(self._source(delta))
        except Exception as error:
            told = as_delta_error(error, delta)
            self._failed[delta] = (time.monotonic() + (told.retry_after_s or self._retry_s), told)
            raise told  # noqa: B904 - it is `error`, or has it as its cause
        self._failed.pop(delta, None)
        return path
