"""The engine: a thread that computes, and the ways to ask it.

    engine = Engine("base/", EngineConfig())
    sha256 = engine.add_delta("deltas/math")
    engine.generate("12 + 30 =", SamplingParams(temperature=0), delta=sha256)     # blocks
    async for event in engine.stream(GenerationRequest(...)): ...                 # many at once

One thread owns all state and never waits for a file, a tokenizer or a consumer. Callers talk to it through an inbox.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from bitdelta_core.engine.api import EngineStats, GenerationRequest, SamplingParams, TokenEvent
from bitdelta_core.engine.completion import Completion, Prompt, collect, normalise
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.core import Deliver, Job
from bitdelta_core.engine.loading import LoadedBase, build_core
from bitdelta_core.engine.mailbox import Mailbox
from bitdelta_core.engine.sources import DeltaSource
from bitdelta_core.errors import BitDeltaError, EngineDead, InvalidRequest, Overloaded

log = logging.getLogger(__name__)


class Engine:
    """One base, its variants, one device."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        config: EngineConfig | None = None,
        delta_source: DeltaSource | None = None,
    ) -> None:
        """Load the base and start the engine's thread.

        Args:
            model_path: a Hugging Face checkpoint directory.
            delta_source: sha256 -> directory of the delta's files; may block. Without one, only `add_delta` adds any.

        Raises:
            CheckpointError: the base cannot be read.
            InvalidRequest: the config does not fit the machine.
        """
        self.config = config or EngineConfig()
        self._wake = threading.Event()
        self._base = LoadedBase(Path(model_path), self.config, delta_source)
        self._core = build_core(self._base, self.config, self._wake.set)
        log.info("engine on %s\n%s", model_path, self._base.memory.table())
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._mailbox = Mailbox()
        self._live: dict[str, int] = {}
        """Request id -> its choices that have not ended."""
        self._dead: EngineDead | None = None
        self._closing = False
        self._stats = self._core.stats()
        self._thread = threading.Thread(target=self._run, name="bitdelta-engine", daemon=True)
        self._thread.start()

    @property
    def memory_table(self) -> str:
        """How the device's memory was divided, for humans."""
        return self._base.memory.table()

    @property
    def base_sha256(self) -> str:
        """Identity of the base's weights."""
        return self._base.sha256

    def add_delta(self, path: str | os.PathLike[str]) -> str:
        """Make a local delta directory servable. Returns the sha256 to ask for it by. Reads every byte once."""
        return self._base.files.add(Path(path))

    def tokenizer(self, delta: str | None = None) -> Any:
        """The Hugging Face tokenizer of a variant, chat template included. Blocks while its files are fetched, so async
        callers call it in a thread; the engine's loop is not involved.

        Raises:
            DeltaError: its files cannot be had, or its tokenizer not be read.
        """
        return self._base.vocabularies.get(delta).tokenizer

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Enqueue. `deliver` is called in the engine's thread with every event, or with the error that ends the
        request; it must not block.

        Raises:
            InvalidRequest: the request is wrong by itself (what depends on the variant is delivered).
            Overloaded: too many requests wait.
            EngineDead: the loop has stopped.
        """
        request.params.validate()
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
        job = Job(request, deliver=self._forgetting(request.request_id, deliver), seed=self._seed(request.params))
        with self._lock:
            self._admit(request)
            self._inbox.put(lambda: self._core.add(job))
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """Stop a request and free what it holds, soon. Unknown or finished requests are ignored."""
        with self._lock:
            if self._live.pop(request_id, None) is None or self._dead:
                return
            self._inbox.put(lambda: self._core.abort(request_id))
        self._wake.set()

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """The request's events, until every choice has ended. Closing the generator, or cancelling its task, aborts.

        Raises:
            BitDeltaError: as `submit`, or the request failed on the way (its variant cannot be loaded, ...).
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[TokenEvent | BitDeltaError]()

        self.submit(request, lambda event: self._mailbox.post(loop, events, event))
        open_choices = request.params.n
        try:
            while open_choices:
                event = await events.get()
                if isinstance(event, BitDeltaError):
                    raise event
                open_choices -= event.finish_reason is not None
                yield event
        finally:
            self.abort(request.request_id)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        delta: str | Sequence[str | None] | None = None,
        tenant: str = "",
    ) -> list[Completion]:
        """Answer all prompts, in order, n completions each. Blocks.

        Args:
            prompts: one or several; each a text (tokenised as the variant does) or token ids.
            delta: the variant of all prompts, or one per prompt; None is the base.

        Raises:
            BitDeltaError: the first error of any prompt; the others are aborted.
        """
        asked = normalise(prompts, delta, self.tokenizer)
        requests = [
            GenerationRequest(
                request_id=f"generate-{os.urandom(8).hex()}",
                prompt_token_ids=ids,
                params=params or SamplingParams(),
                delta=variant,
                tenant=tenant,
            )
            for ids, variant in asked
        ]
        return collect(self, requests)

    def stats(self) -> EngineStats:
        """As of the end of the last step."""
        return self._stats

    def health(self) -> None:
        """Raise EngineDead when the loop has stopped."""
        if self._dead is not None:
            raise self._dead

    def close(self) -> None:
        """Stop the thread. Whoever still waits gets EngineDead."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self, request: GenerationRequest) -> None:
        self.health()
        if request.request_id in self._live:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        limit = self.config.max_num_seqs + self.config.max_waiting
        if sum(self._live.values()) + request.params.n > limit:
            raise Overloaded(f"{limit} choices are running or waiting, which is as many as this engine takes on")
        self._live[request.request_id] = request.params.n

    def _forgetting(self, request_id: str, deliver: Deliver) -> Deliver:
        """`deliver`, which also notes when the request is over."""

        def wrapped(event: TokenEvent | BitDeltaError) -> None:
            if isinstance(event, BitDeltaError) or event.finish_reason is not None:
                with self._lock:
                    left = 0 if isinstance(event, BitDeltaError) else self._live.pop(request_id, 1) - 1
                    self._live.pop(request_id, None)
                    if left:
                        self._live[request_id] = left
            deliver(event)

        return wrapped

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        return int.from_bytes(os.urandom(8), "little") if self.config.seed is None else self.config.seed

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while not self._closing:
                self._wake.clear()
                while not self._inbox.empty():
                    self._inbox.get()()
                busy = self._core.step()
                self._stats = self._core.stats()
                self._mailbox.flush()
                if not busy and self._inbox.empty():
                    self._wake.wait()
        except BaseException as caught:
            error = caught
            log.exception("the engine loop has stopped")
        self._die(error)

    def _die(self, error: BaseException | None) -> None:
        why = "it was closed" if error is None else f"{type(error).__name__}: {error}"
        dead = EngineDead(f"the engine has stopped: {why}")
        dead.__cause__ = error
        with self._lock:
            self._dead = dead
        while not self._inbox.empty():
            self._inbox.get()()
        self._core.end_all(dead)
        self._core.residency.close()
        self._stats = self._core.stats()
        self._mailbox.flush()
