"""Bodies in, bodies out, and the count of both."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitdelta_core.errors import InvalidRequest
from deployments import metrics
from deployments.errors import PayloadTooLarge
from deployments.openai_responses import Answer

_ROUTES = "/v1/completions /v1/chat/completions /v1/models /tokenize /detokenize /health /ping /metrics /version"
ROUTES = frozenset(_ROUTES.split())


async def read_json(request: Request, limit: int) -> Any:
    """The body, parsed.

    Raises:
        PayloadTooLarge: more than `limit` bytes.
        InvalidRequest: not JSON, or text in it that is no Unicode.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise PayloadTooLarge(f"The request body is larger than {limit} bytes.")
    try:
        value = json.loads(bytes(body), parse_constant=_refuse_constant)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair parses, but is no text
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {str(error)[:200] or 'nested too deeply'}") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def json_response(body: Answer, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body.to_json(), status, headers, media_type="application/json")


class CountRequests:
    """Pure ASGI: a wrapper that buffers would break streams."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in ROUTES else "other"
                metrics.count("http_requests_total", route=route, status=str(message["status"]))
            await send(message)

        await self._app(scope, receive, counting)
