"""Other Ray applications and actors that call through handles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from bitdelta_core.errors import InvalidRequest
from deployments.client import BitDeltaClient
from deployments.errors import ModelNotFound
from storage import StoreUnavailable
from tests.integration.serve_harness import Server, wait_for

pytestmark = pytest.mark.ray
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
ENDLESS: dict[str, Any] = {"max_tokens": 8000, "ignore_eos": True, "temperature": 0}


class Caller:
    """Another application of the same cluster."""

    def __init__(self) -> None:
        self._client = BitDeltaClient(tenant="another-app")

    async def complete(self, model: str, prompt: Any) -> tuple[list[str], str]:
        answer = await self._client.complete(prompt, model=model, **GREEDY)
        return [choice.text for choice in answer.choices], answer.model

    async def chat(self, model: str) -> str:
        answer = await self._client.chat([{"role": "user", "content": "hi"}], model=model, temperature=0, max_tokens=8)
        return answer.choices[0].message.content

    async def streamed(self, model: str, prompt: str) -> str:
        return "".join([c.choices[0].text async for c in self._client.stream(prompt, model=model, **GREEDY)])

    async def chat_streamed(self, model: str) -> str:
        chunks = self._client.stream_chat([{"role": "user", "content": "hi"}], model=model, temperature=0, max_tokens=8)
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def leave_early(self, model: str) -> str:
        """Drops the stream without closing it."""
        async for chunk in self._client.stream("Hello", model=model, **ENDLESS):
            return chunk.choices[0].text
        raise AssertionError

    async def error_of(self, model: str, **params: Any) -> tuple[type, str]:
        try:
            await self._client.complete("Hello", model=model, **params)
        except Exception as error:
            return type(error), str(error)
        raise AssertionError

    async def hold_a_stream(self, model: str) -> None:
        async for _ in self._client.stream("Hello", model=model, **ENDLESS):
            pass


@pytest.fixture(scope="module")
def caller(server: Server) -> Iterator[DeploymentHandle]:
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0})(Caller)
    yield serve.run(deployment.bind(), name="another", route_prefix=None)
    serve.delete("another")


def test_answers_are_those_of_http(server: Server, caller: DeploymentHandle) -> None:
    expected = server.models.answer(server.deltas["acme/plain"], "Hello", 12)
    assert caller.complete.remote("acme/plain", "Hello").result(timeout_s=30) == ([expected], "acme/plain")
    assert caller.streamed.remote("acme/plain", "Hello").result(timeout_s=30) == expected
    chat = server.models.answer(server.deltas["acme/chat"], "<|user|>hi\n<|assistant|>", 8)
    assert caller.chat.remote("acme/chat").result(timeout_s=30) == chat
    assert caller.chat_streamed.remote("acme/chat").result(timeout_s=30) == chat


def test_concurrent_calls_inside_one_request_complete(server: Server, caller: DeploymentHandle) -> None:
    found, model = caller.complete.remote("zeta/bits", ["Hello"] * 20).result(timeout_s=30)
    assert found == [server.models.answer(server.deltas["zeta/bits"], "Hello", 12)] * 20
    assert model == "zeta/bits"


def test_errors_are_themselves(server: Server, caller: DeploymentHandle) -> None:
    assert caller.error_of.remote("acme/none").result(timeout_s=30) == (
        ModelNotFound,
        "The model `acme/none` does not exist.",
    )
    kind, message = caller.error_of.remote("acme/plain", temperature=9).result(timeout_s=30)
    assert (kind, "temperature" in message) == (InvalidRequest, True)
    kind, message = caller.error_of.remote("acme/plain", wrong=1).result(timeout_s=30)
    assert (kind, "`wrong`" in message) == (InvalidRequest, True)
    with server.store_down():
        kind, _ = caller.error_of.remote("acme/not-seen-before").result(timeout_s=30)
    assert kind is StoreUnavailable


def test_a_dropped_stream_is_cancelled(server: Server, caller: DeploymentHandle) -> None:
    caller.leave_early.remote("acme/plain").result(timeout_s=30)
    wait_for("the request to be aborted", server.idle, timeout_s=5)


def test_a_caller_that_dies_leaves_nothing_running(server: Server) -> None:
    actor = ray.remote(num_cpus=0)(Caller).remote()
    actor.hold_a_stream.remote("acme/plain")
    wait_for("its request to run", lambda: any(stats.running for stats in server.stats()))
    ray.kill(actor)
    wait_for("the request to be aborted", server.idle, timeout_s=5)


def test_a_python_caller_needs_no_key_but_http_does(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
