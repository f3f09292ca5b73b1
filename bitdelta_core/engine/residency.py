"""How deltas come into the slab, beside the running engine.

    ABSENT -> FETCHING -> ON_DISK -> LOADING -> IN_HOST -> STAGING -> READY
                 |                      |                     |         |
                 +------------- FAILED (error, until when) ---+      evicted -> ABSENT

FETCHING, LOADING and STAGING run in loader threads, one job per delta at a time (single flight); the other states wait
for the engine's thread, which alone moves a delta from state to state and never blocks on one. ON_DISK waits for one of
the host buffers, IN_HOST for room in the slab; both in order of the oldest request that waits for the delta, and the
first in the line is never passed: while pinned extents are in its way, everybody behind it waits.
A delta that nobody wants any more before it reaches the slab is dropped where it stands.

FAILED is a quarantine: until it is over, whoever wants the delta gets the same error at once; then it is tried again.
"""

from __future__ import annotations

import heapq
import queue
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import torch

from bitdelta_core.engine.accelerator import Accelerator
from bitdelta_core.engine.delta_loader import DeltaLoader
from bitdelta_core.engine.host_buffers import HostBuffer, HostBuffers
from bitdelta_core.engine.host_cache import HostCache
from bitdelta_core.engine.loader_pool import LoaderPool
from bitdelta_core.engine.slab import Slab
from bitdelta_core.engine.sources import as_delta_error
from bitdelta_core.engine.variants import Variant
from bitdelta_core.errors import BitDeltaError


class State(StrEnum):
    ABSENT = "absent"
    FETCHING = "fetching"
    ON_DISK = "on_disk"
    LOADING = "loading"
    IN_HOST = "in_host"
    STAGING = "staging"
    READY = "ready"
    FAILED = "failed"


class OpenedDelta(Protocol):
    """A delta whose files are here and valid, and whose layout is known."""

    nbytes: int
    """Of its extent in the slab."""
    variant: Variant

    def fill(self, host: HostBuffer) -> None:
        """Write the extent's bytes into a buffer of `nbytes`. Once."""
        ...

    def view(self, extent: torch.Tensor) -> Any:
        """The compute form over an extent that holds those bytes: what the runner wants of it."""
        ...


@dataclass(eq=False, slots=True)
class Resident:
    """One delta and how far it has come."""

    delta: str
    state: State = State.ABSENT
    waiters: list[int] = field(default_factory=list)
    """Arrivals of the requests that want it and have no pin yet, oldest first."""
    opened: OpenedDelta | None = None
    variant: Variant | None = None
    host: HostBuffer | None = None
    weights: Any = None
    slot: int = -1
    error: BitDeltaError | None = None
    retry_at: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each stage took, by the state's name."""


class Tables(Protocol):
    """Where a device finds what is in which slot. Written between steps, in their order."""

    def publish(self, slot: int, weights: Any, extent_start: int) -> None:
        """Steps launched from now on find the variant's bytes, which are there, at `extent_start` of the slab."""
        ...

    def clear(self, slot: int) -> None:
        """The slot's extent goes to another. No launched step reads it."""
        ...


class Residency:
    """The deltas of one slab. Every method is the engine thread's."""

    def __init__(
        self,
        slab: Slab,
        open_delta: Callable[[str], OpenedDelta],
        wake: Callable[[], None],
        *,
        accelerator: Accelerator,
        tables: Tables | None = None,
        loader: DeltaLoader | None = None,
        fetch_threads: int,
        load_threads: int,
        host_cache_bytes: int,
        retry_s: float,
    ) -> None:
        """`loader`: what `open_delta` uses; closed with this."""
        self.slab = slab
        self.loads = self.failures = self.evictions = 0
        self._open = open_delta
        self._wake = wake
        self._retry_s = retry_s
        self._accelerator = accelerator
        self._tables = tables
        self._max_hosts = load_threads
        self._loader = loader
        make_memory = None if loader is None else loader.make_memory
        self._hosts = HostBuffers(accelerator, keep=load_threads, make_memory=make_memory)
        self._fetchers = LoaderPool("delta-fetch", fetch_threads)
        self._loaders = LoaderPool("delta-load", load_threads)
        self._done: queue.SimpleQueue[tuple[Resident, Any, float]] = queue.SimpleQueue()
        self._entries: dict[str, Resident] = {}
        self._host_cache = HostCache(self._hosts, host_cache_bytes)
        self._free_slots: list[int] = []
        self._slots = 0
        self._blocked_since: float | None = None
        self._stale = False

    def want(self, delta: str, arrival: int) -> Resident:
        """Somebody wants the delta: load it unless that is under way. Until `pin` or `unwant`.

        Raises:
            BitDeltaError: the error of its last load, while it is quarantined.
        """
        entry = self._entries.setdefault(delta, Resident(delta))
        if entry.state is State.FAILED:
            assert entry.error is not None
            if time.monotonic() < entry.retry_at:
                raise entry.error
            entry.state, entry.error = State.ABSENT, None
        insort(entry.waiters, arrival)
        self._stale = True
        return entry

    def unwant(self, entry: Resident, arrival: int) -> None:
        entry.waiters.remove(arrival)
        self._stale = True

    def pin(self, entry: Resident, arrival: int) -> int:
        """Keep a READY delta in the slab for one that wanted it. Returns its slot."""
        assert entry.state is State.READY
        entry.waiters.remove(arrival)
        self.slab.pin(entry.delta)
        return entry.slot

    def unpin(self, entry: Resident) -> None:
        self.slab.unpin(entry.delta)
        self._stale = True

    def blocked(self) -> tuple[float, int] | None:
        """When pins keep the head of the line out of the slab: since how many seconds, and its oldest waiter."""
        line = self._line(State.IN_HOST)
        if self._blocked_since is None or not line or not line[0].waiters:
            return None
        return time.monotonic() - self._blocked_since, line[0].waiters[0]

    @property
    def ready(self) -> tuple[str, ...]:
        """Least recently used first."""
        return tuple(key for key in self.slab.keys if self._entries[key].state is State.READY)

    def staging(self) -> set[str]:
        """Deltas that are being copied into their extents."""
        return {e.delta for e in self._entries.values() if e.state is State.STAGING}

    def state(self, delta: str) -> State:
        entry = self._entries.get(delta)
        return State.ABSENT if entry is None else entry.state

    def collect(self) -> list[Resident]:
        """Take what loader threads have finished. Returns the entries that became READY or FAILED."""
        decided = []
        while not self._done.empty():
            entry, outcome, seconds = self._done.get()
            entry.seconds[entry.state.value] = seconds
            self._finish(entry, outcome)
            self._stale = True
            if entry.state in (State.READY, State.FAILED):
                decided.append(entry)
        return decided

    def advance(self) -> None:
        """Start what can be started: fills while host buffers are free, copies while the slab has room."""
        if not self._stale:
            return
        self._stale = False
        for entry in list(self._entries.values()):
            if entry.state is State.ABSENT:
                self._begin(entry)
            elif not entry.waiters and self._is_idle(entry):
                self._drop(entry)
        self._stage_in_order()
        busy = sum(e.state in (State.LOADING, State.IN_HOST, State.STAGING) for e in self._entries.values())
        for entry in self._line(State.ON_DISK)[: max(0, self._max_hosts - busy)]:
            assert entry.opened is not None
            self._start(entry, State.LOADING, self._loaders, partial(self._fill, entry.opened))

    def expect(self, nbytes: int) -> None:
        """Deltas of about that size will come."""
        self._hosts.expect(nbytes)

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._fetchers.close()
        self._loaders.close()
        self._hosts.close()
        self._host_cache.clear()

    def _is_idle(self, entry: Resident) -> bool:
        """Whether an unwanted entry is worth nothing: it waits for a place, or its quarantine is over."""
        expired = entry.state is State.FAILED and time.monotonic() >= entry.retry_at
        return expired or entry.state in (State.ON_DISK, State.IN_HOST)

    def _line(self, state: State) -> list[Resident]:
        """Oldest waiter first; who lost its last waiter a moment ago goes last."""
        there = [e for e in self._entries.values() if e.state is state]
        return sorted(there, key=lambda e: e.waiters[0] if e.waiters else float("inf"))

    def _begin(self, entry: Resident) -> None:
        kept = self._host_cache.pop(entry.delta)
        if kept is not None:
            entry.opened, entry.host = kept
            entry.state = State.IN_HOST
        else:
            self._start(entry, State.FETCHING, self._fetchers, partial(self._open, entry.delta))

    def _start(self, entry: Resident, state: State, pool: LoaderPool, job: Callable[[], Any]) -> None:
        entry.state, done, wake = state, self._done, self._wake  # a job that hangs does not hold the slab

        def run() -> None:
            began = time.monotonic()
            try:
                outcome = job()
            except BaseException as error:
                outcome = error.with_traceback(None)
            done.put((entry, outcome, time.monotonic() - began))
            wake()

        pool.submit(run)

    def _finish(self, entry: Resident, outcome: Any) -> None:
        if isinstance(outcome, BaseException):
            self._fail(entry, outcome)
        elif entry.state is State.FETCHING:
            entry.opened, entry.state = outcome, State.ON_DISK
            try:
                self.slab.check_fits(entry.delta, outcome.nbytes)
            except BitDeltaError as error:
                self._fail(entry, error)
        elif entry.state is State.LOADING:
            entry.host, entry.state = outcome, State.IN_HOST
        else:
            assert entry.state is State.STAGING
            assert entry.opened is not None
            entry.weights, entry.variant, entry.state = outcome, entry.opened.variant, State.READY
            if self._tables is not None:
                self._tables.publish(entry.slot, entry.weights, self.slab.start(entry.delta))
            self.slab.unpin(entry.delta)
            self.loads += 1
            self._keep_host(entry)

    def _fail(self, entry: Resident, error: BaseException) -> None:
        told = as_delta_error(error, entry.delta)
        if entry.state is State.STAGING:
            self.slab.unpin(entry.delta)
            self.slab.remove(entry.delta)
            heapq.heappush(self._free_slots, entry.slot)
        self._release_host(entry)
        entry.slot, entry.opened = -1, None
        entry.state, entry.error = State.FAILED, told
        entry.retry_at = time.monotonic() + (told.retry_after_s or self._retry_s)
        self.failures += 1

    def _fill(self, opened: OpenedDelta) -> HostBuffer:
        host = self._hosts.take(opened.nbytes)
        try:
            opened.fill(host)
        except BaseException:
            self._hosts.give_back(host)
            raise
        return host

    def _stage(self, opened: OpenedDelta, host: HostBuffer, extent: torch.Tensor) -> Any:
        """Copy into the slab and wait until it has happened. Nothing launched reads the extent: who did is unpinned."""
        self._accelerator.fill(extent[: opened.nbytes], host.bytes_)
        return opened.view(extent[: opened.nbytes])

    def _stage_in_order(self) -> None:
        for entry in self._line(State.IN_HOST):
            assert entry.opened is not None
            plan = self.slab.plan(entry.delta, entry.opened.nbytes)
            if plan is None:
                self._blocked_since = self._blocked_since or time.monotonic()
                return
            extent = self.slab.commit(plan)
            for victim in plan.evict:
                self._forget(self._entries[victim])
            self.evictions += len(plan.evict)
            entry.slot = heapq.heappop(self._free_slots) if self._free_slots else self._new_slot()
            assert entry.host is not None
            self._start(entry, State.STAGING, self._loaders, partial(self._stage, entry.opened, entry.host, extent))
        self._blocked_since = None

    def _new_slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _forget(self, entry: Resident) -> None:
        """The slab has taken the extent back."""
        if self._tables is not None:
            self._tables.clear(entry.slot)
        heapq.heappush(self._free_slots, entry.slot)
        entry.slot, entry.weights, entry.variant = -1, None, None
        self._drop(entry)

    def _drop(self, entry: Resident) -> None:
        self._release_host(entry)
        entry.state, entry.opened = State.ABSENT, None
        if not entry.waiters:
            del self._entries[entry.delta]

    def _release_host(self, entry: Resident) -> None:
        if entry.host is not None:
            self._hosts.give_back(entry.host)
        entry.host = None

    def _keep_host(self, entry: Resident) -> None:
        opened, host, entry.opened, entry.host = entry.opened, entry.host, None, None
        assert opened is not None
        assert host is not None
        self._host_cache.put(entry.delta, opened, host)

    def check_integrity(self) -> None:
        """Assert that states, slab, slots and host memory tell the same story."""
        self.slab.check_integrity()
        entries = self._entries.values()
        in_slab = {e.delta for e in entries if e.state in (State.STAGING, State.READY)}
        assert in_slab == set(self.slab.keys), "slab and states differ"
        slots = [e.slot for e in entries if e.delta in in_slab]
        assert sorted([*slots, *self._free_slots]) == list(range(self._slots)), "a slot is lost or given twice"
        assert all(e.slot == -1 and e.weights is None for e in entries if e.delta not in in_slab)
        assert all((e.weights is not None) == (e.state is State.READY) for e in entries)
        assert all((e.error is not None) == (e.state is State.FAILED) for e in entries)
        assert all((e.host is not None) == (e.state in (State.IN_HOST, State.STAGING)) for e in entries)
        self._host_cache.check_integrity()
        self._hosts.check_integrity()
