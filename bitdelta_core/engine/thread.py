"""The thread that steps an EngineCore, and the thread-safe ways to talk to it.

It owns all of the core's state and never waits for a file, a tokenizer or a consumer. Callers reach it through an
inbox; it answers through each request's `deliver`, at the end of a step, when `stats()` already knows of the step.
An exception in the loop ends everything: all requests get EngineDead.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from numbers import Integral

from bitdelta_core.engine.api import EngineStats, GenerationRequest, TokenEvent
from bitdelta_core.engine.core import Deliver, EngineCore, Job
from bitdelta_core.engine.mailbox import Mailbox
from bitdelta_core.errors import BitDeltaError, EngineDead, InvalidRequest, Overloaded

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Open:
    """A request that counts against the capacity."""

    choices: int
    """Those that have not ended."""


class EngineThread:
    """Starts at once; `close` stops it."""

    def __init__(
        self, build: Callable[[Callable[[], None]], EngineCore], *, capacity: int, seed: int | None = None
    ) -> None:
        """`build` is given the function that wakes the loop. `capacity` bounds the choices that run or wait."""
        self._wake = threading.Event()
        self._core = build(self._wake.set)
        self._capacity = capacity
        self._seed = seed
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: list[tuple[Deliver, TokenEvent | BitDeltaError]] = []
        self._mailbox = Mailbox()
        self._live: dict[str, _Open] = {}
        self._dead: EngineDead | None = None
        self._closing = False
        self._stats = self._core.stats()
        self._thread = threading.Thread(target=self._run, name="bitdelta-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """See Engine.submit."""
        request.params.validate()
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
        if not all(isinstance(token, Integral) for token in request.prompt_token_ids):
            raise InvalidRequest("the prompt must be token ids, which are whole numbers", param="prompt")
        opened = _Open(request.params.n)
        job = Job(request, deliver=self._counting(request.request_id, opened, deliver), seed=self._seed_of(request))
        with self._lock:
            self._admit(request.request_id, opened)
            self._inbox.put(lambda: self._core.add(job))
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """See Engine.abort."""
        with self._lock:
            if self._live.pop(request_id, None) is None or self._dead:
                return
            self._inbox.put(lambda: self._core.abort(request_id))
        self._wake.set()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """See Engine.stream."""
        async with aclosing(self.stream_batches(request)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def stream_batches(
        self, request: GenerationRequest, pause: Callable[[], float] | None = None
    ) -> AsyncGenerator[list[TokenEvent]]:
        """See Engine.stream_batches."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[TokenEvent | BitDeltaError]()
        self.submit(request, lambda event: self._mailbox.post(loop, events, event))
        open_choices = request.params.n
        try:
            while open_choices:
                batch, error = _taken(await events.get(), events)
                open_choices = 0 if error else open_choices - sum(e.finish_reason is not None for e in batch)
                if batch:
                    yield batch
                if error:
                    raise error
                if open_choices and pause:
                    await asyncio.sleep(pause())
        finally:
            if open_choices:  # otherwise the id may be another request's by now
                self.abort(request.request_id)

    def stats(self) -> EngineStats:
        """As of the end of the last step."""
        return self._stats

    def health(self) -> None:
        """Raise EngineDead when the loop has stopped."""
        if self._dead is not None:
            raise self._dead

    def close(self) -> None:
        """Stop. Whoever still waits gets EngineDead."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _admit(self, request_id: str, opened: _Open) -> None:
        self.health()
        if request_id in self._live:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        if sum(other.choices for other in self._live.values()) + opened.choices > self._capacity:
            raise Overloaded(f"{self._capacity} choices run or wait already, as many as this engine takes on")
        self._live[request_id] = opened

    def _counting(self, request_id: str, opened: _Open, deliver: Deliver) -> Deliver:
        """`deliver` at the end of the step, and note what has ended. An aborted request's id may be another's."""

        def wrapped(event: TokenEvent | BitDeltaError) -> None:
            if isinstance(event, BitDeltaError) or event.finish_reason is not None:
                with self._lock:
                    opened.choices = 0 if isinstance(event, BitDeltaError) else opened.choices - 1
                    if not opened.choices and self._live.get(request_id) is opened:
                        del self._live[request_id]
            self._outbox.append((deliver, event))

        return wrapped

    def _seed_of(self, request: GenerationRequest) -> int:
        if request.params.seed is not None:
            return request.params.seed
        return int.from_bytes(os.urandom(8), "little") if self._seed is None else self._seed

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while not self._closing:
                self._turn()
        except BaseException as caught:
            error = caught
            log.exception("the engine loop has stopped")
        self._die(error)

    def _turn(self) -> None:
        self._wake.clear()
        while not self._inbox.empty():
            self._inbox.get()()
        busy = self._core.step()
        self._hand_over()
        if not busy:
            self._wake.wait()

    def _die(self, error: BaseException | None) -> None:
        why = "it was closed" if error is None else f"{type(error).__name__}: {error}"
        dead = EngineDead(f"the engine has stopped: {why}")
        dead.__cause__ = error
        with self._lock:
            self._dead = dead
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # they hold the device's memory
        while not self._inbox.empty():
            with suppress(Exception):
                self._inbox.get()()
        self._core.end_all(dead)
        self._core.residency.close()
        self._hand_over()
        del self._core  # and what it holds of the device: nothing is admitted any more

    def _hand_over(self) -> None:
        self._stats = self._core.stats()
        for deliver, event in self._outbox:
            deliver(event)
        self._outbox.clear()
        self._mailbox.flush()


def _taken(
    first: TokenEvent | BitDeltaError, events: asyncio.Queue[TokenEvent | BitDeltaError]
) -> tuple[list[TokenEvent], BitDeltaError | None]:
    """The first and all that wait behind it, as far as an error."""
    batch, item = [], first
    while not isinstance(item, BitDeltaError):
        batch.append(item)
        if events.empty():
            return batch, None
        item = events.get_nowait()
    return batch, item
