"""Remembered answers of a store: for a short time, and for a longer one while the store is slow or down."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from storage.errors import NotFound, StoreUnavailable

_log = logging.getLogger(__name__)
_MAX_ENTRIES = 10_000
_THREADS = 16
_PAUSE_S = 2.0
"""After a failure, how long nobody asks the store again."""
_PATIENCE_S = 0.5
"""How long a renewal may keep those waiting who could have the last answer instead."""
_QUIET_S = 10.0
"""Between two warnings."""
T = TypeVar("T")


@dataclass(slots=True)
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    answer: Any = None
    """A value, or the NotFound that the store answered with."""
    answered_at: float = float("-inf")
    renewal: Future[Any] | None = None
    renewal_began: float = 0.0


class Lookups:
    """Answers by name. `get` calls `ask`, in a thread of its own, when no answer is younger than the time to live."""

    def __init__(
        self, uri: str, ttl_s: float, missing_ttl_s: float, max_stale_s: float, clock: Callable[[], float]
    ) -> None:
        self._uri = uri
        self._ttl_s, self._missing_ttl_s, self._max_stale_s = ttl_s, missing_ttl_s, max_stale_s
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="lookup")
        self._paused_until = self._quiet_until = float("-inf")
        self._failure: StoreUnavailable | None = None

    def get(self, name: str, ask: Callable[[], T]) -> T:
        """The answer for `name`, as `ask` gave it lately. One thread asks while others wait for the same answer.

        Raises:
            NotFound: as `ask` did lately.
            StoreUnavailable: no answer can be had, and none is remembered from the last `max_stale_s`.
        """
        entry, now = self._entry(name), self._clock()
        with entry.lock:
            last, age = entry.answer, now - entry.answered_at
            if age < (self._missing_ttl_s if isinstance(last, NotFound) else self._ttl_s):
                return _unwrap(last)
            if entry.renewal is None:
                entry.renewal_began = now
                entry.renewal = self._pool.submit(self._renew, entry, ask)
            renewal, waited = entry.renewal, now - entry.renewal_began
        if age > self._max_stale_s or isinstance(last, NotFound):
            return _unwrap(renewal.result())
        try:
            return _unwrap(renewal.result(max(0.0, _PATIENCE_S - waited)))
        except (StoreUnavailable, TimeoutError) as failure:
            self._warn(name, age, failure)
            return last

    def _renew(self, entry: _Entry, ask: Callable[[], T]) -> T | NotFound:
        try:
            answer = self._ask_or_missing(ask)
            with entry.lock:
                entry.answer, entry.answered_at = answer, self._clock()
            return answer
        finally:
            with entry.lock:
                entry.renewal = None

    def _ask_or_missing(self, ask: Callable[[], T]) -> T | NotFound:
        try:
            return self._ask(ask)
        except NotFound as missing:
            return missing

    def _ask(self, ask: Callable[[], T]) -> T:
        """Ask the store, unless it failed a moment ago: its time-outs would hold up every request."""
        if (failure := self._failure) and self._clock() < self._paused_until:
            raise StoreUnavailable(*failure.args, retry_after_s=failure.retry_after_s or _PAUSE_S)
        try:
            answer = ask()
        except StoreUnavailable as failure:
            self._failure, self._paused_until = failure, self._clock() + _PAUSE_S
            raise
        self._failure = None
        return answer

    def _warn(self, name: str, age: float, failure: Exception) -> None:
        if self._clock() >= self._quiet_until:
            self._quiet_until = self._clock() + _QUIET_S
            what, why = name or "the list of variants", str(failure) or f"{self._uri} is slow"
            _log.warning("%s; %s is answered from memory, %.0f s old", why, what, age)

    def _entry(self, name: str) -> _Entry:
        with self._lock:
            entry = self._entries.setdefault(name, _Entry())
            self._entries.move_to_end(name)
            while len(self._entries) > _MAX_ENTRIES:
                self._entries.popitem(last=False)
            return entry


def _unwrap(answer: Any) -> Any:
    if isinstance(answer, NotFound):
        raise NotFound(*answer.args)
    return answer
