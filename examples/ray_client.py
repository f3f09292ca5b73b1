"""Another Ray Serve application that uses the variants through handles: no HTTP, no serialisation to JSON.

bitdelta serve --base DIR --address auto                 # in a cluster (ray start --head)
serve run examples.ray_client:app --name summaries --route-prefix /summaries
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from deployments.client import BitDeltaClient


@serve.deployment()
class Summaries:
    """Asks the variant that the request names, and passes its words on as they come."""

    def __init__(self) -> None:
        self._client = BitDeltaClient(tenant="summaries")

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(self._words(body["text"], body["model"]), media_type="text/plain")

    async def _words(self, text: str, model: str) -> AsyncIterator[str]:
        prompt = f"{text}\n\nIn one sentence:"
        async for chunk in self._client.stream(prompt, model=model, max_tokens=64, temperature=0):
            yield chunk.choices[0].text


app = Summaries.bind()
