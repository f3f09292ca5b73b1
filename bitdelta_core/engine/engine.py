"""The engine, as its users see it: load a base, add variants, ask.

engine = Engine("base/", EngineConfig())
sha256 = engine.add_delta("deltas/math")
engine.generate("12 + 30 =", SamplingParams(temperature=0), delta=sha256)     # blocks
async for event in engine.stream(GenerationRequest(...)): ...                 # many at once
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bitdelta_core.engine import heap
from bitdelta_core.engine.api import EngineStats, GenerationRequest, SamplingParams, TokenEvent
from bitdelta_core.engine.completion import Completion, Prompt, collect, normalise
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.core import Deliver
from bitdelta_core.engine.expected import Published
from bitdelta_core.engine.loading import LoadedBase, build_core
from bitdelta_core.engine.memory import MemoryPlan
from bitdelta_core.engine.passing import call_in_passing_thread
from bitdelta_core.engine.sources import DeltaSource
from bitdelta_core.engine.thread import EngineThread
from bitdelta_core.engine.vocabulary import Vocabulary

log = logging.getLogger(__name__)


class Engine:
    """One base, its variants, one device. Every method may be called from any thread."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        config: EngineConfig | None = None,
        delta_source: DeltaSource | None = None,
        published: Published | None = None,
    ) -> None:
        """Load the base and start the engine's thread.

        Args:
            model_path: a Hugging Face checkpoint directory.
            delta_source: sha256 -> context manager of the directory of the delta's files; may block. Without one, only
                `add_delta` adds any.
            published: on a GPU, asked which variants to capture steps for if the config's `cuda_graph_deltas` is
                empty. Without it, or if it knows none: such as `bitdelta compress` writes by default.

        Raises:
            CheckpointError: the base cannot be read.
            InvalidRequest: the config does not fit the machine.
        """
        self.config = config or EngineConfig()
        self._base = call_in_passing_thread(partial(LoadedBase, Path(model_path), self.config, delta_source))
        try:
            self._thread = EngineThread(
                lambda wake: call_in_passing_thread(partial(build_core, self._base, self.config, published, wake)),
                capacity=self.config.max_num_seqs + self.config.max_waiting,
                seed=self.config.seed,
            )
        except BaseException as error:
            self._base.loader.close()
            traceback.clear_frames(error.__traceback__)  # they hold the device's memory
            self._base.release()
            raise
        self._closed = False
        heap.set_aside()
        log.info("engine on %s, %s\n%s", model_path, self._base.stages.line(), self.memory.table())

    @property
    def memory(self) -> MemoryPlan:
        """How the device's memory is divided; `.table()` is for humans."""
        return self._base.memory

    @property
    def startup_seconds(self) -> Mapping[str, float]:
        """How long each stage of the start took, in order."""
        return self._base.stages.seconds

    @property
    def base_sha256(self) -> str:
        """Identity of the base's weights."""
        return self._base.sha256

    def add_delta(self, path: str | os.PathLike[str]) -> str:
        """Make a local delta directory servable. Returns the sha256 to ask for it by. Reads every byte once."""
        return self._base.files.add(Path(path))

    def tokenizer(self, delta: str | None = None) -> Any:
        """The Hugging Face tokenizer of a variant, chat template included. Blocks while its files are fetched and read,
        so async callers call it in a thread; the engine's loop is not involved.

        Raises:
            DeltaError: its files cannot be had, or its tokenizer cannot be read.
        """
        return self.vocabulary(delta).tokenizer

    def vocabulary(self, delta: str | None = None) -> Vocabulary:
        """A variant's tokenizer, and what else its files say beside the weights. Blocks and raises as `tokenizer`."""
        return self._base.vocabularies.get(delta)

    def context_len(self, config_overrides: Mapping[str, Any] | None = None) -> int:
        """Longest sequence, prompt and answer, of a variant with these overrides of config.json; None: of the base.

        Raises:
            CheckpointError: the overrides are not ones that a variant can have.
        """
        return self._base.context_len(config_overrides or {})

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Enqueue. `deliver` is called in the engine's thread with every event, or with the error that ends the
        request; it must not block or raise.

        Raises:
            InvalidRequest: the request is wrong by itself (what depends on the variant is delivered).
            Overloaded: too many requests wait.
            EngineDead: the loop has stopped.
        """
        self._thread.submit(request, deliver)

    def abort(self, request_id: str) -> None:
        """Stop a request and free what it holds, soon. Unknown or finished requests are ignored."""
        self._thread.abort(request_id)

    def stream(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """The request's events, until every choice has ended. Closing the generator, or cancelling the task that
        iterates it, aborts. Nothing is submitted before the first iteration.

        Raises:
            BitDeltaError: as `submit`, or the request failed on the way (its variant cannot be loaded, ...).
        """
        return self._thread.stream(request)

    def stream_batches(
        self, request: GenerationRequest, pause: Callable[[], float] | None = None
    ) -> AsyncGenerator[list[TokenEvent]]:
        """As `stream`, all events at once that have come.

        Args:
            pause: asked after each batch: seconds in which more may gather. The first comes at once, and nothing waits
                after the last. None: no pauses.
        """
        return self._thread.stream_batches(request, pause)

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
            prompts: one or several; each a text (tokenised as its variant does) or token ids.
            delta: the variant of all prompts, or one per prompt; None is the base.

        Raises:
            BitDeltaError: the first error of any prompt; the others are aborted.
        """
        requests = [
            GenerationRequest(
                request_id=f"generate-{os.urandom(8).hex()}",
                prompt_token_ids=ids,
                params=params or SamplingParams(),
                delta=variant,
                tenant=tenant,
            )
            for ids, variant in normalise(prompts, delta, self.tokenizer)
        ]
        return collect(self, requests)

    def stats(self) -> EngineStats:
        """As of the end of the last step."""
        return self._thread.stats()

    def health(self) -> None:
        """Raise EngineDead when the loop has stopped."""
        self._thread.health()

    def close(self) -> None:
        """Stop the thread and give the device's memory back. Whoever still waits gets EngineDead."""
        self._thread.close()
        if not self._closed:
            self._closed = True
            heap.take_back()
            self._base.release()
            heap.set_rest_aside()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
