"""The parts of a model replica that need no engine: where deltas and tokenizers come from, what Serve is told."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from bitdelta_core.engine.api import EngineStats
from bitdelta_core.errors import BitDeltaError, DeltaFormatError, DeltaUnavailable, EngineDead
from deployments.replica import Deltas, ModelReplica, Tokenizers
from deployments.router import RESIDENT, hint
from storage import CacheFull, CorruptBlob, FileEntry, Manifest, NotFound, StoreUnavailable

MANIFEST = Manifest(
    owner="a", name="b", version=3, files=(FileEntry(path="f", sha256="0" * 64, nbytes=1),), base_sha256="0" * 64
)


class Repository:
    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer

    def fetch(self, manifest: Manifest) -> Path:
        assert manifest == MANIFEST
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def deltas(answer: Path | Exception) -> Deltas:
    found = Deltas(Repository(answer))  # pyright: ignore[reportArgumentType]
    found.remember(MANIFEST)
    return found


def test_a_delta_is_fetched_by_its_hash() -> None:
    assert deltas(Path("/x")).fetch(MANIFEST.delta_sha256) == Path("/x")


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
    with pytest.raises(expected, match="a/b@3") as caught:
        deltas(raised).fetch(MANIFEST.delta_sha256)
    if isinstance(raised, StoreUnavailable):
        assert caught.value.retry_after_s == 7


async def test_a_cold_tokenizer_is_read_once_and_holds_up_no_warm_one() -> None:
    release, loads = threading.Event(), []

    def load(delta: str | None) -> Any:
        loads.append(delta)
        if delta is not None:
            release.wait(10)
        return f"tokenizer of {delta}"

    tokenizers = Tokenizers(load)
    assert await tokenizers.get(None) == "tokenizer of None"
    cold = [asyncio.create_task(tokenizers.get("d")) for _ in range(100)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(tokenizers.get(None), 1) == "tokenizer of None"
    cold[0].cancel()
    release.set()
    assert set(await asyncio.gather(*cold[1:])) == {"tokenizer of d"}
    assert loads == [None, "d"]


async def test_a_tokenizer_that_cannot_be_had_is_asked_for_again() -> None:
    answers: list[Any] = [DeltaUnavailable("down"), "tokenizer"]

    def load(delta: str | None) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    tokenizers = Tokenizers(load)
    with pytest.raises(DeltaUnavailable):
        await tokenizers.get("d")
    assert await tokenizers.get("d") == "tokenizer"


class Engine:
    def __init__(self, dead: bool) -> None:
        self.dead = dead

    def health(self) -> None:
        if self.dead:
            raise EngineDead("stopped")

    def stats(self) -> EngineStats:
        return EngineStats(resident=("f" * 64, "a" * 64))


def replica(dead: bool) -> ModelReplica:
    found = object.__new__(ModelReplica)
    found._engine = Engine(dead)  # pyright: ignore[reportAttributeAccessIssue]
    return found


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
