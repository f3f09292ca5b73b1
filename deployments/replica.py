"""The model replica: one engine and the repository of its deltas. The only place that joins bytes to tensors."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from bitdelta_core.engine.api import EngineStats, GenerationRequest, SamplingParams
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.engine import Engine
from bitdelta_core.engine.vocabulary import Vocabulary
from bitdelta_core.errors import (
    BitDeltaError,
    CheckpointError,
    DeltaFormatError,
    DeltaUnavailable,
    EngineDead,
    InvalidRequest,
)
from deployments import metrics, prompts
from deployments.calls import (
    Accepted,
    DetokenizeCall,
    GenerateCall,
    Item,
    ModelInfo,
    Target,
    TokenizeCall,
    Tokens,
)
from deployments.catalog import open_repository
from deployments.config import AppConfig
from deployments.errors import named
from deployments.pace import Pace
from deployments.published import common_configs
from deployments.router import RESIDENT, hint
from storage import CacheFull, CorruptBlob, Lease, Manifest, Repository, StorageError

MAX_MANIFESTS = 10_000
MAX_VOCABULARIES = 512
COLD_THREADS = 32
METRICS_PERIOD_S = 1.0
CACHE_PATIENCE_S, CACHE_POLL_S = 20.0, 0.05
WHOLE_ANSWER_BATCH = 512
"""Events per message of an answer that is not streamed: far below what may pass at once (`app.RUNTIME_ENV`)."""
logger = logging.getLogger(__name__)


class Deltas:
    """The engine's delta source: sha256 -> leased directory, through the repository's disk cache."""

    def __init__(self, repository: Repository, patience_s: float = CACHE_PATIENCE_S) -> None:
        """`patience_s`: how long to wait for room that other deltas take up while they are being read."""
        self._repository = repository
        self._patience_s = patience_s
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, manifest: Manifest) -> None:
        """Requests bring the manifest of what they want: the engine itself knows hashes only."""
        with self._lock:
            self._manifests[manifest.delta_sha256] = manifest
            self._manifests.move_to_end(manifest.delta_sha256)
            if len(self._manifests) > MAX_MANIFESTS:
                self._manifests.popitem(last=False)

    def lease(self, delta: str) -> Lease:
        """Blocks. The storage package's errors become those of a delta."""
        with self._lock:
            manifest = self._manifests.get(delta)
        assert manifest is not None, "the engine wants a delta that no request brought"
        try:
            return self._lease(manifest)
        except CorruptBlob as error:
            raise DeltaFormatError(str(error), delta=delta) from error
        except StorageError as error:
            wait = error.retry_after_s or 5.0
            raise DeltaUnavailable(f"it cannot be fetched now: {error}", delta=delta, retry_after_s=wait) from error

    def _lease(self, manifest: Manifest) -> Lease:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._repository.lease(manifest)
            except CacheFull as error:
                if error.retry_after_s is None or time.monotonic() > deadline:
                    raise
            time.sleep(CACHE_POLL_S)


class Vocabularies:
    """Each variant's vocabulary. Hits never wait for a thread, so a slow store holds up cold variants only."""

    def __init__(self, load: Callable[[str | None], Vocabulary]) -> None:
        self._load = load
        self._kept: OrderedDict[str | None, Vocabulary] = OrderedDict()
        self._flights: dict[str | None, asyncio.Task[Vocabulary]] = {}
        self._cold = ThreadPoolExecutor(COLD_THREADS, thread_name_prefix="vocabulary-load")

    async def get(self, delta: str | None) -> Vocabulary:
        if delta in self._kept:
            self._kept.move_to_end(delta)
            return self._kept[delta]
        flight = self._flights.get(delta)
        if flight is None:
            flight = self._flights[delta] = asyncio.create_task(self._fetch(delta))
            flight.add_done_callback(lambda _: self._flights.pop(delta))
        return await asyncio.shield(flight)

    async def _fetch(self, delta: str | None) -> Vocabulary:
        vocabulary = await asyncio.get_running_loop().run_in_executor(self._cold, self._load, delta)
        self._kept[delta] = vocabulary
        if len(self._kept) > MAX_VOCABULARIES:
            self._kept.popitem(last=False)
        return vocabulary


class ModelReplica:
    """One Ray Serve replica. Errors are answered as values: see `deployments.calls`."""

    def __init__(self, config: AppConfig) -> None:
        self._closing = ExitStack()
        repository = open_repository(config)
        self._deltas = Deltas(repository)
        options, published = EngineConfig(**config.engine_options()), partial(common_configs, repository)
        self._engine = self._closing.enter_context(Engine(config.base, options, self._deltas.lease, published))
        self._vocabularies = Vocabularies(self._engine.vocabulary)
        self._own_defaults = config.generation_config == "auto"
        self._info = ModelInfo(
            base_name=config.base_name,
            base_sha256=self._engine.base_sha256,
            max_model_len=self._engine.context_len(),
        )
        self._pace = Pace(config.stream_messages_per_s)
        self._stopped = threading.Event()
        self._closing.callback(self._stopped.set)
        threading.Thread(target=self._report, name="metrics", daemon=True).start()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[list[Item]]:
        """`Accepted`, then events; an error is the last item. Closing or cancelling it aborts the request."""
        try:
            async with aclosing(self._answer(call)) as batches:
                async for batch in batches:
                    yield batch
        except BitDeltaError as error:
            metrics.count("request_failures_total", code=error.code)
            yield [named(error, call.target)]

    async def tokenize(self, call: TokenizeCall) -> Tokens | BitDeltaError:
        try:
            vocabulary = await self._vocabulary(call.target)
            tokenizer = vocabulary.tokenizer
            ids = await asyncio.to_thread(prompts.token_ids, tokenizer, call.prompt, call.add_special_tokens)
            texts = tuple(tokenizer.convert_ids_to_tokens(list(ids)))
            context = self._engine.context_len(vocabulary.config_overrides)
            return Tokens(token_ids=ids, texts=texts, max_model_len=context)
        except BitDeltaError as error:
            return named(error, call.target)

    async def detokenize(self, call: DetokenizeCall) -> str | BitDeltaError:
        try:
            tokenizer = (await self._vocabulary(call.target)).tokenizer
            prompts.check_ids(tokenizer, call.token_ids)
            return await asyncio.to_thread(tokenizer.decode, list(call.token_ids))
        except BitDeltaError as error:
            return named(error, call.target)

    async def context_lens(self, overrides: Sequence[Mapping[str, Any]]) -> list[int]:
        """Of variants with these overrides of config.json; the base's for overrides that no variant can have."""

        def context_len(changes: Mapping[str, Any]) -> int:
            try:
                return self._engine.context_len(changes)
            except CheckpointError:
                return self._info.max_model_len

        return [context_len(changes) for changes in overrides]

    async def info(self) -> ModelInfo:
        return self._info

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def healthy(self) -> bool:
        try:
            self._engine.health()
        except EngineDead:
            return False
        return True

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose engine is dead."""
        self._engine.health()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve, for the routers. Changes only when residency does: unchanged stats cost no broadcast."""
        return {RESIDENT: sorted(hint(delta) for delta in self._engine.stats().resident)}

    def __del__(self) -> None:
        """Called by Serve after the replica was drained, or could not be made."""
        self._closing.close()

    async def _answer(self, call: GenerateCall) -> AsyncGenerator[list[Item]]:
        timer = metrics.RequestTimer()
        vocabulary = await self._vocabulary(call.target)
        tokenizer = vocabulary.tokenizer
        ids = await asyncio.to_thread(prompts.token_ids, tokenizer, call.prompt, call.add_special_tokens)
        request = GenerationRequest(
            request_id=call.request_id,
            prompt_token_ids=ids,
            params=self._params(call, vocabulary, len(ids)),
            delta=call.target.delta,
            tenant=call.tenant,
        )
        batch: list[Item] = [_accepted(call, ids, tokenizer)]
        pause = self._pace.pause if call.stream else None
        with self._pace.stream() if call.stream else nullcontext():
            async with aclosing(self._engine.stream_batches(request, pause)) as arrivals:
                async for events in arrivals:
                    timer.saw(events)
                    batch += events
                    if call.stream or len(batch) >= WHOLE_ANSWER_BATCH:
                        yield batch
                        batch = []
        if batch:
            yield batch

    async def _vocabulary(self, target: Target) -> Vocabulary:
        if target.manifest is not None:
            self._deltas.remember(target.manifest)
        return await self._vocabularies.get(target.delta)

    def _params(self, call: GenerateCall, vocabulary: Vocabulary, prompt_tokens: int) -> SamplingParams:
        """What the request leaves out is the variant's to say; a limit that nobody asked for fits the context."""
        defaults = _sampling_defaults(vocabulary) if self._own_defaults else {}
        params = replace(call.params, **{name: value for name, value in defaults.items() if name in call.left_out})
        if "max_tokens" not in call.left_out or params.max_tokens is None:
            return params
        room = self._engine.context_len(vocabulary.config_overrides) - prompt_tokens
        return replace(params, max_tokens=max(1, params.min_tokens, min(params.max_tokens, room)))

    def _report(self) -> None:
        reporter = metrics.EngineMetrics()
        while not self._stopped.wait(METRICS_PERIOD_S):
            reporter.update(self._engine.stats())


def _accepted(call: GenerateCall, ids: tuple[int, ...], tokenizer: Any) -> Accepted:
    if not call.echo:
        return Accepted(prompt_tokens=len(ids))
    skip = call.params.skip_special_tokens
    text = call.prompt if isinstance(call.prompt, str) else tokenizer.decode(list(ids), skip_special_tokens=skip)
    return Accepted(prompt_tokens=len(ids), prompt_text=text, first_token_text=tokenizer.decode([ids[0]]))


def _sampling_defaults(vocabulary: Vocabulary) -> Mapping[str, Any]:
    try:
        return vocabulary.sampling_defaults
    except InvalidRequest as error:
        raise CheckpointError(
            f"generation_config.json: {error}; `--generation-config none` does without its defaults"
        ) from error
