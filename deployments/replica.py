"""The model replica: one engine and the repository of its deltas. The only place that joins bytes to tensors."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

from bitdelta_core.engine.api import EngineStats, GenerationRequest, TokenEvent
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.engine import Engine
from bitdelta_core.errors import BitDeltaError, DeltaFormatError, DeltaUnavailable, EngineDead
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
from deployments.router import RESIDENT, hint
from storage import CorruptBlob, Manifest, Repository, StorageError

MAX_MANIFESTS = 10_000
MAX_TOKENIZERS = 512
COLD_THREADS = 32
METRICS_PERIOD_S = 1.0
WHOLE_ANSWER_BATCH = 512
"""Events per message of an answer that is not streamed: far below gRPC's limit of 4 MiB."""
logger = logging.getLogger(__name__)


class Deltas:
    """The engine's delta source: sha256 -> directory, through the repository's disk cache."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, manifest: Manifest) -> None:
        """Requests bring the manifest of what they want: the engine itself knows hashes only."""
        with self._lock:
            self._manifests[manifest.delta_sha256] = manifest
            self._manifests.move_to_end(manifest.delta_sha256)
            if len(self._manifests) > MAX_MANIFESTS:
                self._manifests.popitem(last=False)

    def fetch(self, delta: str) -> Path:
        """Blocks. The storage package's errors become those of a delta, which name the variant."""
        with self._lock:
            manifest = self._manifests.get(delta)
        assert manifest is not None, "the engine wants a delta that no request brought"
        try:
            return self._repository.fetch(manifest)
        except CorruptBlob as error:
            raise DeltaFormatError(f"{manifest.model_id}: {error}", delta=manifest.model_id) from error
        except StorageError as error:
            wait = error.retry_after_s or 5.0
            raise DeltaUnavailable(
                f"{manifest.model_id} cannot be fetched now: {error}", delta=manifest.model_id, retry_after_s=wait
            ) from error


class Tokenizers:
    """Each variant's tokenizer. Hits never wait for a thread, so a slow store holds up cold variants only."""

    def __init__(self, load: Callable[[str | None], Any]) -> None:
        self._load = load
        self._kept: OrderedDict[str | None, Any] = OrderedDict()
        self._flights: dict[str | None, asyncio.Task[Any]] = {}
        self._cold = ThreadPoolExecutor(COLD_THREADS, thread_name_prefix="tokenizer-load")

    async def get(self, delta: str | None) -> Any:
        if delta in self._kept:
            self._kept.move_to_end(delta)
            return self._kept[delta]
        flight = self._flights.get(delta)
        if flight is None:
            flight = self._flights[delta] = asyncio.create_task(self._fetch(delta))
            flight.add_done_callback(lambda _: self._flights.pop(delta))
        return await asyncio.shield(flight)

    async def _fetch(self, delta: str | None) -> Any:
        tokenizer = await asyncio.get_running_loop().run_in_executor(self._cold, self._load, delta)
        self._kept[delta] = tokenizer
        if len(self._kept) > MAX_TOKENIZERS:
            self._kept.popitem(last=False)
        return tokenizer


class ModelReplica:
    """One Ray Serve replica. Errors are answered as values: see `deployments.calls`."""

    def __init__(self, config: AppConfig) -> None:
        self._deltas = Deltas(open_repository(config))
        self._engine = Engine(config.base, EngineConfig(**config.engine_options()), self._deltas.fetch)
        self._tokenizers = Tokenizers(self._engine.tokenizer)
        self._info = ModelInfo(
            base_name=config.base_name,
            base_sha256=self._engine.base_sha256,
            max_model_len=_context_len(config),
        )
        self._stopped = threading.Event()
        threading.Thread(target=self._report, name="metrics", daemon=True).start()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[list[Item]]:
        """`Accepted`, then events; an error is the last item. Closing or cancelling it aborts the request."""
        try:
            async with aclosing(self._answer(call)) as batches:
                async for batch in batches:
                    yield batch
        except (BitDeltaError, StorageError) as error:
            metrics.count("request_failures_total", code=error.code)
            yield [error]

    async def tokenize(self, call: TokenizeCall) -> Tokens | BitDeltaError:
        try:
            tokenizer = await self._tokenizer(call.target)
            ids = await asyncio.to_thread(prompts.token_ids, tokenizer, call.prompt, call.add_special_tokens)
            texts = tuple(tokenizer.convert_ids_to_tokens(list(ids)))
            return Tokens(token_ids=ids, texts=texts, max_model_len=self._info.max_model_len)
        except BitDeltaError as error:
            return error

    async def detokenize(self, call: DetokenizeCall) -> str | BitDeltaError:
        try:
            tokenizer = await self._tokenizer(call.target)
            prompts.check_ids(tokenizer, call.token_ids)
            return await asyncio.to_thread(tokenizer.decode, list(call.token_ids))
        except BitDeltaError as error:
            return error

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
        """Called by Serve after the replica was drained."""
        self._stopped.set()
        self._engine.close()

    async def _answer(self, call: GenerateCall) -> AsyncGenerator[list[Item]]:
        timer = metrics.RequestTimer()
        tokenizer = await self._tokenizer(call.target)
        ids = await asyncio.to_thread(prompts.token_ids, tokenizer, call.prompt, call.add_special_tokens)
        request = GenerationRequest(
            request_id=call.request_id,
            prompt_token_ids=ids,
            params=call.params,
            delta=call.target.delta,
            tenant=call.tenant,
        )
        batch: list[Item] = [_accepted(call, ids, tokenizer)]
        async with aclosing(_stream(self._engine, request)) as events:
            async for event in events:
                timer.saw(event)
                batch.append(event)
                if call.stream or len(batch) >= WHOLE_ANSWER_BATCH:
                    yield batch
                    batch = []
        if batch:
            yield batch

    async def _tokenizer(self, target: Target) -> Any:
        if target.manifest is not None:
            self._deltas.remember(target.manifest)
        return await self._tokenizers.get(target.delta)

    def _report(self) -> None:
        reporter = metrics.EngineMetrics()
        while not self._stopped.wait(METRICS_PERIOD_S):
            reporter.update(self._engine.stats())


def _stream(engine: Engine, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
    events = engine.stream(request)
    assert isinstance(events, AsyncGenerator)
    return events


def _accepted(call: GenerateCall, ids: tuple[int, ...], tokenizer: Any) -> Accepted:
    if not call.echo:
        return Accepted(prompt_tokens=len(ids))
    skip = call.params.skip_special_tokens
    text = call.prompt if isinstance(call.prompt, str) else tokenizer.decode(list(ids), skip_special_tokens=skip)
    return Accepted(prompt_tokens=len(ids), prompt_text=text, first_token_text=tokenizer.decode([ids[0]]))


def _context_len(config: AppConfig) -> int:
    own = json.loads((config.base / "config.json").read_text())["max_position_embeddings"]
    return min(own, config.max_model_len or own)
