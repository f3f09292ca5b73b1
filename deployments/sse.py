"""Server-sent events: frames, the end mark, errors after the headers, and comments that keep idle connections open.

The status line is held back until the first chunk is there, so that an early error has its own status. If that takes
longer than one keep-alive interval (a cold delta), the headers go out and a later error becomes a frame.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bitdelta_core.errors import BitDeltaError
from deployments.errors import describe
from deployments.openai_responses import Answer
from storage.errors import StorageError

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"
KEEP_ALIVE_S = 15.0
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
logger = logging.getLogger(__name__)


def frame(json: str) -> str:
    return f"data: {json}\n\n"


async def respond(chunks: AsyncGenerator[Answer], keep_alive_s: float = KEEP_ALIVE_S) -> EventStream:
    """Answer with the chunks. Takes over `chunks`: it is closed when the stream ends, fails or is dropped.

    Raises:
        Exception: whatever the first chunk raised, when that comes within `keep_alive_s`.
    """
    stream = EventStream(chunks, keep_alive_s)
    try:
        await stream.peek()
    except BaseException:
        await stream.close()
        raise
    return stream


class EventStream(StreamingResponse):
    """One response. `close` stands in `__call__`, not in the frame generator: a generator that the client's leaving
    keeps from starting, or that is being cancelled, cannot be relied on to run its `finally` to the end."""

    def __init__(self, chunks: AsyncGenerator[Answer], keep_alive_s: float) -> None:
        super().__init__(self._frames(), media_type="text/event-stream", headers=HEADERS)
        self._chunks = chunks
        self._keep_alive_s = keep_alive_s
        self._pending = self._next()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.close()

    async def peek(self) -> None:
        """Wait for the first chunk, but no longer than a keep-alive interval; raise its error."""
        done, _ = await asyncio.wait({self._pending}, timeout=self._keep_alive_s)
        if done:
            self._pending.result()

    async def close(self) -> None:
        """Stop whatever produces the chunks."""
        self._pending.cancel()
        await asyncio.wait({self._pending})  # a generator cannot be closed while its __anext__ runs
        if not self._pending.cancelled():
            self._pending.exception()  # retrieved: it was reported, or nobody is left to hear it
        await self._chunks.aclose()

    async def _frames(self) -> AsyncIterator[str]:
        try:
            while True:
                while not (await asyncio.wait({self._pending}, timeout=self._keep_alive_s))[0]:
                    yield KEEP_ALIVE
                chunk = self._pending.result()
                if chunk is None:
                    break
                frames = [frame(chunk.to_json())]
                while (more := await self._waiting()) is not None:
                    frames.append(frame(more.to_json()))
                yield "".join(frames)
        except Exception as error:
            if not isinstance(error, BitDeltaError | StorageError):
                logger.exception("stream failed")
            yield frame(describe(error)[1].to_json())
        yield DONE

    async def _waiting(self) -> Answer | None:
        """The next chunk, if it is there already: what came in one message goes on in one."""
        self._pending = self._next()
        await asyncio.sleep(0)
        there = self._pending.done() and not self._pending.cancelled() and self._pending.exception() is None
        return self._pending.result() if there else None

    def _next(self) -> asyncio.Future[Answer | None]:
        return asyncio.ensure_future(_next_or_none(self._chunks))


async def _next_or_none(chunks: AsyncGenerator[Answer]) -> Answer | None:
    return await anext(chunks, None)
