"""Frames, the status of early errors, keep-alive, and that whoever leaves stops the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.types import Message

from bitdelta_core.errors import Overloaded
from deployments.openai_responses import DetokenizeAnswer
from deployments.sse import DONE, KEEP_ALIVE, respond

LONG = 30.0


class Source:
    """Chunks from a script: a text, an error, or an event to wait for."""

    def __init__(self, *script: str | Exception | asyncio.Event) -> None:
        self.script, self.closed = script, False

    async def chunks(self) -> AsyncGenerator[Any]:
        try:
            for step in self.script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield DetokenizeAnswer(prompt=step)
        finally:
            self.closed = True


async def read(response: Any, on_body: Callable[[str], None] = lambda text: None) -> tuple[int, list[str]]:
    """Run the response as a server would; status and frames."""
    status, frames = 0, []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["body"]:
            frames.append(message["body"].decode())
            on_body(frames[-1])

    await response({"type": "http", "asgi": {"spec_version": "2.0"}}, receive, send)
    return status, frames


async def test_frames_and_the_end_mark() -> None:
    """What is there at once goes in one piece; nothing waits for what is not."""
    later = asyncio.Event()
    source = Source("a", "b", later, "c")
    status, frames = await read(await respond(source.chunks()), lambda text: later.set())
    together = 'data: {"prompt":"a"}\n\ndata: {"prompt":"b"}\n\n'
    assert (status, frames) == (200, [together, 'data: {"prompt":"c"}\n\n', DONE])
    assert source.closed


async def test_an_early_error_is_raised_before_any_header() -> None:
    source = Source(Overloaded("full"))
    with pytest.raises(Overloaded):
        await respond(source.chunks())
    assert source.closed


LATE = [(Overloaded("full"), "overloaded"), (KeyError("secret"), "internal_error")]


@pytest.mark.parametrize(("error", "code"), LATE)
async def test_a_late_error_is_a_frame_and_then_the_end_mark(error: Exception, code: str) -> None:
    source = Source("a", error)
    status, frames = await read(await respond(source.chunks()))
    assert status == 200
    assert f'"code":"{code}"' in frames[1]
    assert frames[1].startswith('data: {"error":{')
    assert "secret" not in frames[1]
    assert frames[2] == DONE
    assert source.closed


async def test_keep_alive_while_nothing_comes_even_before_the_first_chunk() -> None:
    first = asyncio.Event()
    seen = []

    def on_body(frame: str) -> None:
        seen.append(frame)
        if seen.count(KEEP_ALIVE) == 2:
            first.set()

    _, frames = await read(await respond(Source(first, "a").chunks(), keep_alive_s=0.01), on_body)
    assert frames[:2] == [KEEP_ALIVE, KEEP_ALIVE]
    assert [f for f in frames if f != KEEP_ALIVE] == ['data: {"prompt":"a"}\n\n', DONE]


async def test_an_error_after_the_first_keep_alive_is_a_frame() -> None:
    wait = asyncio.Event()
    response = await respond(Source(wait, Overloaded("full")).chunks(), keep_alive_s=0.01)
    wait.set()
    _, frames = await read(response)
    assert '"code":"overloaded"' in frames[-2]


@pytest.mark.parametrize("when", ["peek", "between frames"])
async def test_leaving_closes_the_source(when: str) -> None:
    started = asyncio.Event()
    source = Source(asyncio.Event()) if when == "peek" else Source("a", asyncio.Event())

    async def serve() -> None:
        if when == "peek":
            started.set()
        response = await respond(source.chunks(), LONG)
        await read(response, lambda frame: started.set())

    task = asyncio.create_task(serve())
    await started.wait()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert source.closed


@pytest.mark.parametrize("when", ["at once", "after a frame"])
async def test_a_client_that_disconnects_closes_the_source(when: str) -> None:
    """Starlette tells by cancelling a task group, in which every further await fails at once."""
    source, sent = Source("a", asyncio.Event()), asyncio.Event()
    response = await respond(source.chunks(), LONG)
    if when == "at once":
        sent.set()

    async def receive() -> Message:
        await sent.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body"):
            sent.set()

    await asyncio.wait_for(response({"type": "http", "asgi": {"spec_version": "2.0"}}, receive, send), 5)
    assert source.closed
