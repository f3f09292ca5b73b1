"""For other Ray applications in the same cluster: typed calls through deployment handles, without HTTP.

    client = BitDeltaClient()
    answer = await client.complete("2 + 2 =", model="acme/math", max_tokens=4, temperature=0)
    async for chunk in client.stream_chat([{"role": "user", "content": "hi"}], model="acme/support"):
        ...

Parameters and answers are those of the HTTP API, and so is what names mean. Errors are raised as themselves
(`bitdelta_core.errors`, `storage.errors`, `deployments.errors`). Leaving a stream cancels it. API keys do not apply:
whoever can call a handle is inside the cluster.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from bitdelta_core.errors import BitDeltaError, InvalidRequest
from deployments import chat, completions
from deployments.calls import GenerateCall, Target
from deployments.gateway import REPLICAS, Gateway
from deployments.openai_api import ChatRequest, CompletionRequest, parse_body
from deployments.openai_responses import ChatCompletion, ChatCompletionChunk, Completion
from deployments.requests import chat_call, completion_calls
from storage import StorageError

APP = "bitdelta"


class BitDeltaClient:
    """Cheap to make; keep one, so that its handles' routers stay warm. Use it inside a running event loop."""

    def __init__(self, app: str = APP, *, tenant: str = "") -> None:
        """`app`: the name under which the application was deployed. `tenant`: whose share the calls count against."""
        self._ingress: DeploymentHandle = serve.get_app_handle(app).options(_by_reference=False)
        self._gateway = Gateway(serve.get_deployment_handle(REPLICAS, app))
        self._tenant = tenant

    async def complete(self, prompt: str | Sequence[Any], *, model: str = "", **params: Any) -> Completion:
        """As `POST /v1/completions`."""
        body = _completion(prompt, model, params, stream=False)
        request_id, target, calls = await self._completion_calls(body)
        return await completions.completion(body, request_id, target.model, self._gateway.items(calls))

    async def chat(self, messages: Sequence[dict[str, Any]], *, model: str = "", **params: Any) -> ChatCompletion:
        """As `POST /v1/chat/completions`."""
        body = _chat(messages, model, params, stream=False)
        request_id, target, call = await self._chat_call(body)
        return await chat.chat_completion(body, request_id, target.model, self._gateway.items([call]))

    async def stream(
        self, prompt: str | Sequence[Any], *, model: str = "", **params: Any
    ) -> AsyncGenerator[Completion]:
        """`complete` in pieces."""
        body = _completion(prompt, model, params, stream=True)
        request_id, target, calls = await self._completion_calls(body)
        chunks = completions.completion_chunks(body, request_id, target.model, self._gateway.items(calls))
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def stream_chat(
        self, messages: Sequence[dict[str, Any]], *, model: str = "", **params: Any
    ) -> AsyncGenerator[ChatCompletionChunk]:
        """`chat` in pieces."""
        body = _chat(messages, model, params, stream=True)
        request_id, target, call = await self._chat_call(body)
        chunks = chat.chat_chunks(body, request_id, target.model, self._gateway.items([call]))
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def _completion_calls(self, body: CompletionRequest) -> tuple[str, Target, list[GenerateCall]]:
        request_id, target = f"cmpl-{uuid.uuid4().hex}", await self._target(body.model)
        return request_id, target, completion_calls(body, request_id, target, self._tenant)

    async def _chat_call(self, body: ChatRequest) -> tuple[str, Target, GenerateCall]:
        request_id, target = f"chatcmpl-{uuid.uuid4().hex}", await self._target(body.model)
        return request_id, target, chat_call(body, request_id, target, self._tenant)

    async def _target(self, model: str) -> Target:
        answer = await self._ingress.resolve.remote(model)
        if isinstance(answer, BitDeltaError | StorageError):
            raise answer
        return answer


def _completion(prompt: Any, model: str, params: dict[str, Any], *, stream: bool) -> CompletionRequest:
    prompt = prompt if isinstance(prompt, str) else [p if isinstance(p, str | int) else list(p) for p in prompt]
    return parse_body(CompletionRequest, _body(params, model, stream) | {"prompt": prompt})


def _chat(messages: Sequence[dict[str, Any]], model: str, params: dict[str, Any], *, stream: bool) -> ChatRequest:
    return parse_body(ChatRequest, _body(params, model, stream) | {"messages": list(messages)})


def _body(params: dict[str, Any], model: str, stream: bool) -> dict[str, Any]:
    if "stream" in params:
        raise InvalidRequest("Streaming is chosen by the method: stream, stream_chat.", param="stream")
    return {**params, "model": model, "stream": stream}
