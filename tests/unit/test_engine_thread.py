"""The engine's thread over a fake model: streams, cancellation, overload, death."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bitdelta_core.engine.api import GenerationRequest, SamplingParams, TokenEvent
from bitdelta_core.engine.thread import EngineThread, _Open, _taken
from bitdelta_core.errors import BitDeltaError, DeltaFormatError, EngineDead, InvalidRequest, Overloaded
from tests.unit.engine_fakes import World, answer

A, B = ("0a", "0b")
PROMPT = (3, 1, 4, 1, 5)


class Running:
    """A World behind a thread."""

    def __init__(self, *, capacity: int = 20, **limits: Any) -> None:
        self.world = World(**limits)
        self.thread = EngineThread(self._build, capacity=capacity, seed=1)

    def _build(self, wake: Callable[[], None]) -> Any:
        self.world.core.residency._wake = wake
        return self.world.core

    def request(self, name: str, delta: str | None = None, **params: Any) -> GenerationRequest:
        given = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **params})
        return GenerationRequest(request_id=name, prompt_token_ids=PROMPT, delta=delta, params=given)

    async def tokens(self, name: str, delta: str | None = None, **params: Any) -> list[int]:
        return [t async for e in self.thread.stream(self.request(name, delta, **params)) for t in e.token_ids]

    async def settle(self) -> None:
        """Wait until nothing runs or waits."""
        async with asyncio.timeout(20):
            while True:
                stats = self.thread.stats()
                if not (stats.running or stats.waiting or stats.waiting_for_delta or self.thread._live):
                    return
                await asyncio.sleep(0.002)


@pytest.fixture
def running() -> Iterator[Running]:
    one = Running()
    yield one
    one.thread.close()


async def test_streams_of_many_variants_at_once(running: Running) -> None:
    deltas = [None, A, B, A, None, B]
    got = await asyncio.gather(*(running.tokens(str(i), d) for i, d in enumerate(deltas)))
    assert got == [answer(d, PROMPT, 6) for d in deltas]
    await running.settle()
    assert running.thread.stats().kv_blocks_used == 0
    assert running.thread.stats().generation_tokens_total == 36


async def test_batches_gather_while_their_reader_pauses(running: Running) -> None:
    """The first comes at once, nothing is lost or out of order, and nobody waits after the last."""
    asked = []

    def pause() -> float:
        asked.append(1)
        return 0.2

    batches = [b async for b in running.thread.stream_batches(running.request("r", A, max_tokens=40), pause)]
    assert [t for batch in batches for event in batch for t in event.token_ids] == answer(A, PROMPT, 40)
    assert batches[-1][-1].finish_reason == "length"
    assert len(asked) == len(batches) - 1
    assert len(batches) < 40


async def test_what_came_before_an_error_is_told_first() -> None:
    first, second, error = TokenEvent(request_id="a"), TokenEvent(request_id="a", text="b"), EngineDead("gone")
    waiting: asyncio.Queue[TokenEvent | BitDeltaError] = asyncio.Queue()
    assert _taken(first, waiting) == ([first], None)
    for item in (second, error, first):
        waiting.put_nowait(item)
    assert _taken(first, waiting) == ([first, second], error)
    assert _taken(error, waiting) == ([], error)
    assert waiting.qsize() == 1


async def test_closing_the_generator_aborts(running: Running) -> None:
    stream = running.thread.stream(running.request("r", A, max_tokens=40))
    async for event in stream:
        assert event.finish_reason is None
        break
    await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    await running.settle()
    assert running.thread.stats().kv_blocks_used == 0
    assert running.thread.stats().pinned == ()


async def test_closing_a_finished_stream_spares_the_next_request_of_its_name(running: Running) -> None:
    first = running.thread.stream(running.request("r", A, max_tokens=1))
    assert (await anext(first)).finish_reason == "length"
    second = running.thread.stream(running.request("r", B, max_tokens=30))
    got = list((await anext(second)).token_ids)
    await first.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    async with asyncio.timeout(20):
        got += [t async for event in second for t in event.token_ids]
    assert got == answer(B, PROMPT, 30)


def test_a_late_event_of_an_aborted_request_does_not_count_against_the_next_of_its_name(running: Running) -> None:
    late = running.thread._counting("a", _Open(1), lambda event: None)
    newer = running.thread._live["a"] = _Open(2)
    late(TokenEvent(request_id="a", finish_reason="stop"))
    assert running.thread._live.pop("a") is newer
    assert newer.choices == 2


async def test_cancelling_the_task_aborts_even_while_the_delta_loads(running: Running) -> None:
    gate = running.world.source.gates[A] = threading.Event()
    task = asyncio.create_task(running.tokens("r", A))
    async with asyncio.timeout(20):
        while not running.thread.stats().waiting_for_delta:
            await asyncio.sleep(0.002)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await running.settle()
    gate.set()
    assert await running.tokens("again", A) == answer(A, PROMPT, 6)


async def test_steps_go_on_while_a_source_blocks(running: Running) -> None:
    gate = running.world.source.gates[B] = threading.Event()
    blocked = asyncio.create_task(running.tokens("blocked", B))
    before = running.thread.stats().steps_total
    for i in range(5):
        assert await running.tokens(f"r{i}", A, max_tokens=20) == answer(A, PROMPT, 20)
    assert running.thread.stats().steps_total >= before + 5 * 20
    assert not blocked.done()
    gate.set()
    assert await blocked == answer(B, PROMPT, 6)


async def test_an_error_reaches_the_stream_that_it_belongs_to(running: Running) -> None:
    running.world.source.errors[B] = DeltaFormatError("truncated", delta=B)
    good, bad = await asyncio.gather(running.tokens("good", A), running.tokens("bad", B), return_exceptions=True)
    assert good == answer(A, PROMPT, 6)
    assert bad is running.world.source.errors[B]


async def test_overload_is_refused_at_once_and_passes() -> None:
    running = Running(capacity=3)
    gate = running.world.source.gates[A] = threading.Event()
    tasks = [asyncio.create_task(running.tokens("two", A, n=2)), asyncio.create_task(running.tokens("one", A))]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await running.tokens("more")
    assert caught.value.retry_after_s
    gate.set()
    await asyncio.gather(*tasks)
    await running.settle()
    assert await running.tokens("more") == answer(None, PROMPT, 6)
    running.thread.close()


async def test_requests_that_are_wrong_by_themselves(running: Running) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        await running.tokens("r", temperature=3.0)
    with pytest.raises(InvalidRequest, match="empty"):
        running.thread.submit(GenerationRequest(request_id="r", prompt_token_ids=()), lambda event: None)
    running.world.source.gates[A] = threading.Event()
    running.thread.submit(running.request("twice", A), lambda event: None)
    with pytest.raises(InvalidRequest, match="in use"):
        running.thread.submit(running.request("twice"), lambda event: None)
    running.world.source.gates[A].set()


async def test_an_exception_in_the_loop_is_everybodys_end(running: Running) -> None:
    steps = 0

    def explode() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("device lost")

    running.world.decoder.before_forward = explode
    running.world.source.gates[B] = threading.Event()
    outcomes = await asyncio.gather(
        *(running.tokens(str(i), d) for i, d in enumerate((None, A, B))), return_exceptions=True
    )
    assert all(isinstance(outcome, EngineDead) for outcome in outcomes)
    assert "device lost" in str(outcomes[0])
    with pytest.raises(EngineDead, match="device lost"):
        running.thread.health()
    with pytest.raises(EngineDead):
        await running.tokens("late")
    running.world.source.gates[B].set()


async def test_whoever_waits_is_told_though_the_rest_of_the_inbox_fails_as_well(running: Running) -> None:
    running.world.source.gates[A] = threading.Event()
    task = asyncio.create_task(running.tokens("r", A))
    await asyncio.sleep(0.05)
    for _ in range(2):
        running.thread._inbox.put(lambda: 1 / 0)
    running.thread._wake.set()
    with pytest.raises(EngineDead, match="ZeroDivisionError"):
        await asyncio.wait_for(task, 10)
    running.world.source.gates[A].set()


def test_a_crash_holds_no_memory() -> None:
    """Its error is raised as long as somebody asks."""
    world = World()
    core, given = weakref.ref(world.core), [world.core]
    thread = EngineThread(lambda wake: given.pop(), capacity=2)
    world.core.residency.advance = lambda: 1 / 0  # pyright: ignore[reportAttributeAccessIssue]
    del world
    thread._wake.set()
    thread._thread.join(10)
    with pytest.raises(EngineDead, match="ZeroDivisionError") as caught:
        thread.health()
    gc.collect()
    assert core() is None, caught


@pytest.mark.parametrize("prompt", [(1, "a"), (1.0,), (None,)])
def test_tokens_that_are_no_numbers_are_refused(running: Running, prompt: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidRequest, match="whole numbers"):
        running.thread.submit(GenerationRequest(request_id="r", prompt_token_ids=prompt), print)
    running.thread.health()


async def test_closing_ends_whoever_waits() -> None:
    running = Running()
    running.world.source.gates[A] = threading.Event()
    task = asyncio.create_task(running.tokens("r", A))
    await asyncio.sleep(0)
    running.thread.close()
    with pytest.raises(EngineDead, match="closed"):
        await task
    running.world.source.gates[A].set()


def test_a_plain_callback_gets_every_event_and_ids_can_be_used_again(running: Running) -> None:
    for _ in range(3):
        events: list[Any] = []
        done = threading.Event()

        def deliver(event: Any, events: list[Any] = events, done: threading.Event = done) -> None:
            events.append(event)
            if event.finish_reason:
                done.set()

        running.thread.submit(running.request("same"), deliver)
        assert done.wait(20)
        assert all(isinstance(event, TokenEvent) for event in events)
        assert [t for e in events for t in e.token_ids] == answer(None, PROMPT, 6)
