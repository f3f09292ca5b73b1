"""The parts of a model replica that need no engine: where deltas and vocabularies come from, what Serve is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitdelta_core.engine.api import EngineStats
from bitdelta_core.engine.vocabulary import Vocabulary
from bitdelta_core.errors import BitDeltaError, CheckpointError, DeltaFormatError, DeltaUnavailable, EngineDead
from deployments.calls import Target
from deployments.config import AppConfig
from deployments.openai_api import CompletionRequest, parse_body
from deployments.replica import Deltas, ModelReplica, Vocabularies
from deployments.requests import completion_calls
from deployments.router import RESIDENT, hint
from storage import CacheFull, CorruptBlob, FileEntry, Manifest, NotFound, StoreUnavailable

MANIFEST = Manifest(
    owner="a", name="b", version=3, files=(FileEntry(path="f", sha256="0" * 64, nbytes=1),), base_sha256="0" * 64
)


class Repository:
    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer

    def lease(self, manifest: Manifest) -> Path:
        assert manifest == MANIFEST
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def deltas(answer: Path | Exception) -> Deltas:
    found = Deltas(Repository(answer))  # pyright: ignore[reportArgumentType]
    found.remember(MANIFEST)
    return found


def test_a_delta_is_leased_by_its_hash() -> None:
    assert deltas(Path("/x")).lease(MANIFEST.delta_sha256) == Path("/x")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (CorruptBlob("hash differs"), DeltaFormatError),
        (StoreUnavailable("no answer", retry_after_s=7), DeltaUnavailable),
        (NotFound("blob is gone"), DeltaUnavailable),
        (CacheFull("too large"), DeltaUnavailable),
    ],
)
def test_what_storage_says_becomes_an_error_of_the_variant(raised: Exception, expected: type[BitDeltaError]) -> None:
    with pytest.raises(expected, match=str(raised)) as caught:
        deltas(raised).lease(MANIFEST.delta_sha256)
    if isinstance(raised, StoreUnavailable):
        assert caught.value.retry_after_s == 7


@pytest.mark.parametrize("room_comes", [True, False])
def test_a_full_cache_is_waited_for(room_comes: bool) -> None:
    """Other deltas leave it when they have been read; one that can never fit is told at once."""
    answers: list[Any] = [CacheFull("in use", retry_after_s=5.0), CacheFull("too large")]
    if room_comes:
        answers[1] = Path("/x")

    class Full(Repository):
        def lease(self, manifest: Manifest) -> Path:
            self.answer = answers.pop(0)
            return super().lease(manifest)

    found = Deltas(Full(Path()))  # pyright: ignore[reportArgumentType]
    found.remember(MANIFEST)
    if room_comes:
        assert found.lease(MANIFEST.delta_sha256) == Path("/x")
    else:
        with pytest.raises(DeltaUnavailable, match="too large"):
            found.lease(MANIFEST.delta_sha256)
    assert answers == []


async def test_a_cold_vocabulary_is_read_once_and_holds_up_no_warm_one() -> None:
    release, loads = threading.Event(), []

    def load(delta: str | None) -> Any:
        loads.append(delta)
        if delta is not None:
            release.wait(10)
        return f"vocabulary of {delta}"

    vocabularies = Vocabularies(load)
    assert await vocabularies.get(None) == "vocabulary of None"
    cold = [asyncio.create_task(vocabularies.get("d")) for _ in range(100)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(vocabularies.get(None), 1) == "vocabulary of None"
    cold[0].cancel()
    release.set()
    assert set(await asyncio.gather(*cold[1:])) == {"vocabulary of d"}
    assert loads == [None, "d"]


async def test_a_vocabulary_that_cannot_be_had_is_asked_for_again() -> None:
    answers: list[Any] = [DeltaUnavailable("down"), "vocabulary"]

    def load(delta: str | None) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    vocabularies = Vocabularies(load)
    with pytest.raises(DeltaUnavailable):
        await vocabularies.get("d")
    assert await vocabularies.get("d") == "vocabulary"


class Engine:
    def __init__(self, dead: bool) -> None:
        self.dead = dead

    def health(self) -> None:
        if self.dead:
            raise EngineDead("stopped")

    def stats(self) -> EngineStats:
        return EngineStats(resident=("f" * 64, "a" * 64))

    def context_len(self, config_overrides: Mapping[str, Any]) -> int:
        return config_overrides.get("max_position_embeddings", 100)


@pytest.mark.parametrize(
    ("given", "prompt_tokens", "expected"),
    [
        ({}, 10, {"temperature": 0.6, "top_k": 20, "max_tokens": 30}),
        ({}, 35, {"max_tokens": 5}),
        ({}, 50, {"max_tokens": 1}),
        ({"temperature": 1.0, "max_tokens": 90}, 35, {"temperature": 1.0, "top_k": 20, "max_tokens": 90}),
    ],
)
def test_what_a_request_leaves_out_is_the_variants_to_say(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], prompt_tokens: int, expected: dict[str, Any]
) -> None:
    """A limit that the request did not set is cut to the context; one that it set is the engine's to refuse."""
    monkeypatch.delattr(ModelReplica, "__del__")
    defaults = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 30}
    vocabulary = Vocabulary(None, frozenset(), defaults, {"max_position_embeddings": 40})
    body = parse_body(CompletionRequest, {"prompt": "x", **given})
    (call,) = completion_calls(body, "r", Target(model="m"), "")
    found = replica(dead=False)
    found._own_defaults = True
    params = found._params(call, vocabulary, prompt_tokens)
    assert {name: getattr(params, name) for name in expected} == expected
    found._own_defaults = False
    plain = replace(call.params, max_tokens=max(1, min(16, 40 - prompt_tokens)) if not given else 90)
    assert found._params(call, vocabulary, prompt_tokens) == plain


def test_a_broken_generation_config_is_the_variants_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ModelReplica, "__del__")
    (call,) = completion_calls(parse_body(CompletionRequest, {"prompt": "x"}), "r", Target(model="m"), "")
    found = replica(dead=False)
    found._own_defaults = True
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature"):
        found._params(call, Vocabulary(None, frozenset(), {"temperature": "hot"}), 1)


def replica(dead: bool) -> ModelReplica:
    found = object.__new__(ModelReplica)
    found._engine = Engine(dead)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def test_a_replica_that_could_not_be_made_is_put_away(tmp_path: Path) -> None:
    """Serve calls `__del__` of it: an error there would hide the first one."""
    made = object.__new__(ModelReplica)
    with pytest.raises(CheckpointError):
        made.__init__(AppConfig(base=tmp_path, repo=str(tmp_path / "deltas")))
    made.__del__()


async def test_serve_is_told_that_an_engine_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ModelReplica, "__del__")
    await replica(dead=False).check_health()
    assert await replica(dead=False).healthy()
    with pytest.raises(EngineDead):
        await replica(dead=True).check_health()
    assert not await replica(dead=True).healthy()


async def test_routers_are_told_what_is_resident_in_an_order_that_use_does_not_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(ModelReplica, "__del__")
    stats = await replica(dead=False).record_routing_stats()
    assert stats == {RESIDENT: [hint("a" * 64), hint("f" * 64)]}
