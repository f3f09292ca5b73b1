"""The HTTP routes: parse, authenticate, resolve the name, call, respond. Everything else is elsewhere.

Two deployments have them: `Ingress`, which calls the replicas, and `DirectReplica`, which is one.

No `from __future__ import annotations` here: Serve pickles this class by value, and then FastAPI could not look up the
names in annotations that are strings.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator

from fastapi import FastAPI
from ray import serve
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bitdelta_core.errors import BitDeltaError
from bitdelta_core.version import VERSION
from deployments import cards, chat, completions, metrics_text, sse
from deployments.auth import ANYBODY, Account, authenticate
from deployments.calls import DetokenizeCall, Target, TokenizeCall
from deployments.catalog import Catalog
from deployments.config import AppConfig
from deployments.errors import describe, http_error
from deployments.gateway import Gateway
from deployments.http import CountRequests, json_response, read_json
from deployments.openai_api import (
    AnyBody,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_body,
)
from deployments.openai_responses import Answer, DetokenizeAnswer, TokenizeAnswer
from deployments.requests import chat_call, completion_calls
from storage.errors import StorageError

logger = logging.getLogger(__name__)


class Front:
    """The handlers. A deployment inherits them and says what they work with."""

    def __init__(self, config: AppConfig, gateway: Gateway, catalog: Catalog) -> None:
        self._config = config
        self._keys = config.keys()
        self._gateway = gateway
        self._catalog = catalog

    async def post_completions(self, request: Request) -> Response:
        account, body = await self._enter(request, CompletionRequest)
        request_id = f"cmpl-{uuid.uuid4().hex}"
        target = await self._target(body.model, account)
        items = self._gateway.items(completion_calls(body, request_id, target, account.tenant))
        if body.stream:
            return await self._stream(completions.completion_chunks(body, request_id, target.model, items))
        return json_response(await completions.completion(body, request_id, target.model, items))

    async def post_chat(self, request: Request) -> Response:
        account, body = await self._enter(request, ChatRequest)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        target = await self._target(body.model, account)
        items = self._gateway.items([chat_call(body, request_id, target, account.tenant)])
        if body.stream:
            return await self._stream(chat.chat_chunks(body, request_id, target.model, items))
        return json_response(await chat.chat_completion(body, request_id, target.model, items))

    async def get_models(self, request: Request) -> Response:
        account, info = self._account(request), await self._gateway.info()
        manifests = await self._catalog.variants(info, account.owners)
        return json_response(cards.model_list(info, manifests, await self._gateway.context_lens(manifests)))

    async def get_model(self, request: Request, model: str) -> Response:
        target = await self._target(model, self._account(request))
        info = await self._gateway.info()
        if target.manifest is None:
            return json_response(cards.base(info))
        (context_len,) = await self._gateway.context_lens([target.manifest])
        return json_response(cards.variant(info, target.model, target.manifest, context_len))

    async def post_tokenize(self, request: Request) -> Response:
        account, body = await self._enter(request, TokenizeRequest)
        prompt = body.chat_prompt(body.messages) if body.messages else body.prompt
        assert prompt is not None, "the request was validated"
        target = await self._target(body.model, account)
        found = await self._gateway.tokenize(
            TokenizeCall(target=target, prompt=prompt, add_special_tokens=body.add_special_tokens)
        )
        count, strings = len(found.token_ids), {"token_strs": list(found.texts)} if body.return_token_strs else {}
        answer = {"count": count, "max_model_len": found.max_model_len, "tokens": list(found.token_ids), **strings}
        return json_response(TokenizeAnswer.model_validate(answer))

    async def post_detokenize(self, request: Request) -> Response:
        account, body = await self._enter(request, DetokenizeRequest)
        target = await self._target(body.model, account)
        call = DetokenizeCall(target=target, token_ids=tuple(body.tokens))
        return json_response(DetokenizeAnswer(prompt=await self._gateway.detokenize(call)))

    async def get_health(self) -> Response:
        return Response(status_code=200 if await self._gateway.healthy() else 503)

    async def get_metrics(self) -> Response:
        text = await asyncio.to_thread(metrics_text.of_application, serve.get_replica_context().app_name)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def get_version(self) -> dict[str, str]:
        return {"version": VERSION}

    async def resolve(self, model: str) -> Target | BitDeltaError | StorageError:
        """For Python clients in the same cluster, who need no key."""
        try:
            return await self._target(model, ANYBODY)
        except (BitDeltaError, StorageError) as error:
            return error

    async def _enter(self, request: Request, kind: type[AnyBody]) -> tuple[Account, AnyBody]:
        """Who asks, and for what."""
        account = self._account(request)
        body = parse_body(kind, await read_json(request, self._config.max_body_bytes))
        return account, body

    def _account(self, request: Request) -> Account:
        return authenticate(self._keys, request.headers.get("authorization"))

    async def _target(self, model: str, account: Account) -> Target:
        return await self._catalog.target(model, await self._gateway.info(), account.owners)

    async def _stream(self, chunks: AsyncGenerator[Answer]) -> Response:
        return await sse.respond(chunks, self._config.keep_alive_s)


def new_api() -> FastAPI:
    """The routes of one deployment: Serve binds an application's routes to one class."""
    api = FastAPI(title="bitdelta", version=VERSION, docs_url=None, redoc_url=None, openapi_url=None)
    api.add_middleware(CountRequests)
    for kind, handler in ((BitDeltaError, foreseen), (StorageError, foreseen), (HTTPException, no_such_route)):
        api.add_exception_handler(kind, handler)
    api.add_exception_handler(Exception, foreseen)
    for method, path, endpoint in ROUTES:
        api.add_api_route(path, endpoint, methods=[method])
    return api


async def foreseen(_: Request, error: Exception) -> Response:
    status, body, headers = describe(error)
    return json_response(body, status, headers)


async def no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    return json_response(http_error(error.status_code, code, message), error.status_code, dict(error.headers or {}))


ROUTES = (
    ("POST", "/v1/completions", Front.post_completions),
    ("POST", "/v1/chat/completions", Front.post_chat),
    ("GET", "/v1/models", Front.get_models),
    ("GET", "/v1/models/{model:path}", Front.get_model),
    ("POST", "/tokenize", Front.post_tokenize),
    ("POST", "/detokenize", Front.post_detokenize),
    ("GET", "/health", Front.get_health),
    ("HEAD", "/health", Front.get_health),
    ("GET", "/ping", Front.get_health),
    ("HEAD", "/ping", Front.get_health),
    ("GET", "/metrics", Front.get_metrics),
    ("GET", "/version", Front.get_version),
)
