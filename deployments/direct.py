"""Direct streaming: every replica answers HTTP itself, and no other Python process touches a token.

HAProxy, which Ray Serve starts on every node, asks `Picker` which replica a request should go to, and then talks to
that replica. Affinity is that of `router`; it learns how busy replicas are from their routing stats, because no reply
passes it. All of Ray needs `config.DIRECT_ENVIRONMENT`, and Serve's hook for this,
`Application._with_ingress_request_router`, may change: nothing else here knows of it.

No `from __future__ import annotations` here: see `front`.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitdelta_core.engine.api import TokenEvent
from bitdelta_core.errors import BitDeltaError
from deployments.auth import ANYBODY
from deployments.calls import Accepted, GenerateCall, ModelInfo
from deployments.catalog import Catalog, open_repository
from deployments.config import AppConfig
from deployments.front import Front, new_api
from deployments.gateway import Gateway
from deployments.replica import ModelReplica
from deployments.router import LOAD
from storage.errors import StorageError

PICKER = "Picker"
REPLICA_HEADER = b"x-replica-id"
LOAD_STEP = 8
"""Load is told in multiples of this many requests: every change of a replica's stats is broadcast to all routers."""


class LocalGateway(Gateway):
    """The gateway of a replica to itself."""

    def __init__(self, replica: ModelReplica) -> None:
        self._replica = replica
        self._info: ModelInfo | None = None

    async def _once(self, call: GenerateCall) -> AsyncGenerator[Accepted | TokenEvent]:
        async with aclosing(self._replica.generate(call)) as batches:
            async for batch in batches:
                for item in batch:
                    if isinstance(item, BitDeltaError):
                        raise item
                    yield item

    async def _call(self, method: str, *args: Any, delta: str | None = None) -> Any:
        answer = await getattr(self._replica, method)(*args)
        if isinstance(answer, BitDeltaError):
            raise answer
        return answer


class NameReplica:
    """Pure ASGI: says in every answer which replica it is from."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start":
                name = serve.get_replica_context().replica_id.unique_id
                message["headers"] = [*message.get("headers", ()), (REPLICA_HEADER, name.encode())]
            await send(message)

        await self._app(scope, receive, naming if scope["type"] == "http" else send)


direct_api = new_api()
direct_api.add_middleware(NameReplica)


@serve.ingress(direct_api)
class DirectReplica(Front, ModelReplica):
    """A model replica with the HTTP front in the same process."""

    def __init__(self, config: AppConfig) -> None:
        ModelReplica.__init__(self, config)
        Front.__init__(self, config, LocalGateway(self), Catalog(open_repository(config)))

    async def record_routing_stats(self) -> dict[str, Any]:
        stats = self._engine.stats()
        load = stats.running + stats.waiting + stats.waiting_for_delta
        return {**await super().record_routing_stats(), LOAD: load // LOAD_STEP * LOAD_STEP}


picker_api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@serve.ingress(picker_api)
class Picker:
    """Tells HAProxy where a request goes. Whether the caller may ask for the model is the replica's business."""

    def __init__(self, config: AppConfig, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._gateway = Gateway(replicas)
        self._catalog = Catalog(open_repository(config))

    @picker_api.post("/internal/route")
    async def route(self, request: Request) -> Response:
        delta = await self._delta(await request.body())
        handle = self._replicas if delta is None else self._replicas.options(multiplexed_model_id=delta)
        async with handle.choose_replica(_reserve=False) as selection:
            replica = selection._replica
            assert replica.backend_http_endpoint is not None, "a replica without an HTTP port of its own"
            host, port = replica.backend_http_endpoint
            chosen = {"host": host, "port": port, "replica_id": replica.replica_id.to_full_id_str()}
        return JSONResponse(chosen)

    async def _delta(self, body: bytes) -> str | None:
        """None where there is no affinity: the base, and whatever a replica will refuse."""
        try:
            model = json.loads(body).get("model")
            if not isinstance(model, str):
                return None
            target = await self._catalog.target(model, await self._gateway.info(), ANYBODY.owners)
        except (ValueError, AttributeError, RecursionError, BitDeltaError, StorageError):
            return None
        return target.delta


def with_picker(replicas: Application, picker: Application) -> Application:
    """The application in which `picker` chooses among `replicas`."""
    return replicas._with_ingress_request_router(picker)
