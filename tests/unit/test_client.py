"""Calls to replicas: what is retried, what is cancelled, which error a caller sees. Handles are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentResponseGenerator

from bitdelta_core.engine.api import SamplingParams, TokenEvent
from bitdelta_core.errors import InvalidRequest, Overloaded
from deployments.calls import Accepted, GenerateCall, Target
from deployments.client import _chat, _completion
from deployments.errors import ReplicaLost
from deployments.gateway import MAX_FAN_OUT, Gateway
from storage import FileEntry, Manifest

ACCEPTED, EVENT = Accepted(prompt_tokens=1), TokenEvent(request_id="r", text="a", token_ids=(1,))
LOST = ActorUnavailableError("gone", b"0" * 16)


class Response(DeploymentResponseGenerator):
    """What a scripted handle answers: batches, an error to raise, or an event to wait for."""

    def __init__(self, script: list[Any]) -> None:
        self.cancelled = 0
        self._batches = self._run(script)

    async def _run(self, script: list[Any]) -> AsyncGenerator[Any]:
        for step in script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
            else:
                yield step

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._batches)

    def cancel(self) -> None:
        self.cancelled += 1


@dataclass
class Handle:
    scripts: list[list[Any]]
    responses: list[Response] = field(default_factory=list)
    options_seen: list[dict[str, Any]] = field(default_factory=list)

    def options(self, **options: Any) -> Handle:
        self.options_seen.append(options)
        return self

    def remote(self, call: GenerateCall) -> Response:
        self.responses.append(Response(self.scripts[len(self.responses)]))
        return self.responses[-1]


def calls(count: int = 1, target: Target | None = None) -> list[GenerateCall]:
    target = target or Target(model="base")
    return [GenerateCall(request_id=f"r{i}", target=target, prompt="x", params=SamplingParams()) for i in range(count)]


async def collect(handle: Handle, asked: list[GenerateCall]) -> list[tuple[int, Any]]:
    return [item async for item in Gateway(handle).items(asked)]  # pyright: ignore[reportArgumentType]


async def test_batches_become_items_and_the_response_is_cancelled_in_the_end() -> None:
    handle = Handle([[[ACCEPTED, EVENT], [EVENT]]])
    assert await collect(handle, calls()) == [(0, ACCEPTED), (0, EVENT), (0, EVENT)]
    assert handle.responses[0].cancelled == 1


async def test_calls_go_by_value_and_carry_the_delta_only_for_variants() -> None:
    """By reference, a replica would not notice that its caller died."""
    manifest = Manifest(
        owner="a", name="b", version=1, files=(FileEntry(path="f", sha256="0" * 64, nbytes=1),), base_sha256="0" * 64
    )
    handle = Handle([[[ACCEPTED]], [[ACCEPTED]]])
    gateway = Gateway(handle)  # pyright: ignore[reportArgumentType]
    assert all(options["_by_reference"] is False for options in handle.options_seen)
    before = len(handle.options_seen)
    assert [item async for item in gateway.items(calls())]
    assert len(handle.options_seen) == before
    assert [item async for item in gateway.items(calls(target=Target(model="a/b", manifest=manifest)))]
    assert handle.options_seen[before:] == [{"multiplexed_model_id": manifest.delta_sha256}]


async def test_a_replica_that_dies_silently_is_replaced_once() -> None:
    handle = Handle([[LOST], [[ACCEPTED, EVENT]]])
    assert await collect(handle, calls()) == [(0, ACCEPTED), (0, EVENT)]
    with pytest.raises(ReplicaLost):
        await collect(Handle([[LOST], [LOST]]), calls())


async def test_nothing_is_retried_after_the_first_item() -> None:
    handle = Handle([[[ACCEPTED, EVENT], LOST]])
    with pytest.raises(ReplicaLost):
        await collect(handle, calls())
    assert handle.responses[0].cancelled == 1


@pytest.mark.parametrize(
    ("raised", "expected"),
    [([InvalidRequest("no", param="n")], InvalidRequest), (BackPressureError(1, 1), Overloaded)],
    ids=["an error as a value", "back-pressure"],
)
async def test_errors_are_themselves(raised: Any, expected: type) -> None:
    handle = Handle([[raised]])
    with pytest.raises(expected) as caught:
        await collect(handle, calls())
    assert expected is not InvalidRequest or caught.value.param == "n"
    assert handle.responses[0].cancelled == 1


async def test_several_calls_are_numbered_and_limited() -> None:
    count = 3 * MAX_FAN_OUT
    handle = Handle([[[ACCEPTED], [EVENT]] for _ in range(count)])
    found = await collect(handle, calls(count))
    assert sorted(number for number, _ in found) == sorted(list(range(count)) * 2)
    assert all(response.cancelled == 1 for response in handle.responses)


async def test_one_failing_call_ends_all_of_them() -> None:
    handle = Handle([[[ACCEPTED], asyncio.Event()], [[ACCEPTED, EVENT], [Overloaded("full")]], [asyncio.Event()]])
    with pytest.raises(Overloaded):
        await asyncio.wait_for(collect(handle, calls(3)), 5)
    assert [response.cancelled for response in handle.responses] == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 3])
async def test_leaving_cancels_every_call(count: int) -> None:
    handle = Handle([[[ACCEPTED], asyncio.Event()] for _ in range(count)])
    async with aclosing(Gateway(handle).items(calls(count))) as items:  # pyright: ignore[reportArgumentType]
        await anext(items)
    assert [response.cancelled for response in handle.responses] == [1] * count


def test_python_arguments_are_the_http_parameters() -> None:
    body = _completion(["a", "b"], "acme/x", {"max_tokens": 3}, stream=True)
    assert (body.prompts(), body.model, body.stream, body.max_tokens) == (["a", "b"], "acme/x", True, 3)
    assert _completion((1, 2), "", {}, stream=False).prompts() == [(1, 2)]
    assert _completion([(1, 2), (3,)], "", {}, stream=False).prompts() == [(1, 2), (3,)]
    assert _chat([{"role": "user", "content": "x"}], "m", {}, stream=False).messages[0].content == "x"
    with pytest.raises(InvalidRequest, match="chosen by the method"):
        _completion("a", "", {"stream": True}, stream=False)
