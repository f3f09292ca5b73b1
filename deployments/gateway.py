"""Calls to the model replicas, the same for HTTP and for Python clients: always streamed, always cancelled when left.

Calls go by value over gRPC (`_by_reference=False`): besides being faster, a replica then notices when its caller dies.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from bitdelta_core.engine.api import TokenEvent
from bitdelta_core.errors import BitDeltaError, Overloaded
from deployments.calls import Accepted, DetokenizeCall, GenerateCall, ModelInfo, TokenizeCall, Tokens
from deployments.errors import ReplicaLost
from deployments.metadata import context_overrides
from storage.manifest import Manifest

INGRESS, REPLICAS = "Ingress", "ModelReplica"
"""Names of the application's two deployments."""
MAX_FAN_OUT = 64
"""Choices of one request that are under way at a time"""
HEALTH_TIMEOUT_S = 5.0
Numbered = tuple[int, Accepted | TokenEvent]
"""The number of the call among those of one request, and what its replica sent."""
logger = logging.getLogger(__name__)


class Gateway:
    """A configured handle to the replicas of one application."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._stream = replicas.options(method_name="generate", stream=True, _by_reference=False)
        self._unary = replicas.options(_by_reference=False)
        self._info: ModelInfo | None = None

    async def info(self) -> ModelInfo:
        """What the replicas serve."""
        info = self._info or await self._call("info")
        self._info = info
        return info

    async def context_lens(self, manifests: Sequence[Manifest]) -> list[int]:
        """Longest sequence of each variant. A replica works out those for which `bitdelta push` noted changes."""
        noted = [json.dumps(context_overrides(manifest), sort_keys=True) for manifest in manifests]
        known = {"{}": (await self.info()).max_model_len}
        if distinct := sorted({*noted} - known.keys()):
            lens = await self._call("context_lens", [json.loads(text) for text in distinct])
            known |= zip(distinct, lens, strict=True)
        return [known[text] for text in noted]

    async def healthy(self) -> bool:
        """Whether a replica answers, and its engine is alive."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                return await self._call("healthy")
        except (TimeoutError, BitDeltaError):
            return False

    async def tokenize(self, call: TokenizeCall) -> Tokens:
        return await self._call("tokenize", call, delta=call.target.delta)

    async def detokenize(self, call: DetokenizeCall) -> str:
        return await self._call("detokenize", call, delta=call.target.delta)

    async def items(self, calls: Sequence[GenerateCall]) -> AsyncGenerator[Numbered]:
        """(number of the call, item) of all calls as they come. Leaving the generator cancels what still runs.

        Raises:
            BitDeltaError: the first that any call meets.
        """
        source = self._several(calls) if len(calls) > 1 else self._numbered(0, calls[0])
        async with aclosing(source):
            async for item in source:
                yield item

    async def _several(self, calls: Sequence[GenerateCall]) -> AsyncGenerator[Numbered]:
        queue: asyncio.Queue[Numbered | Exception | None] = asyncio.Queue(maxsize=2 * MAX_FAN_OUT)
        slots = asyncio.Semaphore(max(1, MAX_FAN_OUT // calls[0].params.n))

        async def pump(number: int, call: GenerateCall) -> None:
            async with slots, aclosing(self._numbered(number, call)) as items:
                async for item in items:
                    await queue.put(item)

        async def pump_all() -> None:
            end: Exception | None = None
            try:
                async with asyncio.TaskGroup() as group:
                    for number, call in enumerate(calls):
                        group.create_task(pump(number, call))
            except ExceptionGroup as errors:
                end = errors.exceptions[0]
            await queue.put(end)

        pumps = asyncio.create_task(pump_all())
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            pumps.cancel()
            await asyncio.wait({pumps})

    async def _numbered(self, number: int, call: GenerateCall) -> AsyncGenerator[Numbered]:
        """One call; a replica that dies before it said anything is replaced by another, once."""
        for last_try in (False, True):
            begun = False
            try:
                async with aclosing(self._once(call)) as items:
                    async for item in items:
                        begun = True
                        yield number, item
                return
            except ReplicaLost:
                if begun or last_try:
                    raise
                logger.warning("replica lost before it answered %s; trying another", call.request_id)

    async def _once(self, call: GenerateCall) -> AsyncGenerator[Accepted | TokenEvent]:
        response = _towards(self._stream, call.target.delta).remote(call)
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for batch in response:
                for item in batch:
                    if isinstance(item, BitDeltaError):
                        raise item
                    yield item
        except (RayError, RayServeException, grpc.RpcError) as error:
            raise _named(error) from error
        finally:
            response.cancel()  # dropping a response does not stop the replica

    async def _call(self, method: str, *args: Any, delta: str | None = None) -> Any:
        response = getattr(_towards(self._unary, delta), method).remote(*args)
        try:
            answer = await response
        except (RayError, RayServeException, grpc.RpcError) as error:
            raise _named(error) from error
        finally:
            response.cancel()
        if isinstance(answer, BitDeltaError):
            raise answer
        return answer


def _towards(handle: DeploymentHandle, delta: str | None) -> DeploymentHandle:
    """Options on a handle share its router, so this is cheap. No id for the base: it has no affinity."""
    return handle if delta is None else handle.options(multiplexed_model_id=delta)


def _named(error: Exception) -> Exception:
    """What a failure between us and a replica means to the caller."""
    if isinstance(error, BackPressureError):
        return Overloaded("All replicas are full; try again.")
    if isinstance(error, TaskCancelledError):
        return ReplicaLost("The request was cancelled before it finished.")
    if isinstance(error, DeploymentUnavailableError):
        return ReplicaLost("No replica is available; try again.")
    logger.warning("lost a replica: %r", error)
    return ReplicaLost("The replica that worked on this request was lost; try again.")
