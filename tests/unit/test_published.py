"""What a replica asks the repository at its start."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from bitdelta_core.delta.config import DeltaConfig
from deployments.metadata import metadata_of
from deployments.published import LOOKED_AT, common_configs
from storage import Catalog, DiskCache, MemoryStore, Repository, StoreUnavailable

BASE, OTHER_BASE = "0" * 64, "1" * 64


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("published")


@pytest.fixture
def repository(store: MemoryStore, tmp_path: Path) -> Repository:
    return Repository(store, DiskCache(tmp_path / "cache", 10_000))


class Publisher:
    """Variants of nothing but a config and so many bytes."""

    def __init__(self, store: MemoryStore, work: Path) -> None:
        self.catalog = Catalog(store)
        self.work = work

    def __call__(self, name: str, codec: str, size: int = 10, base: str = BASE, text: bytes | None = None) -> None:
        path = self.work / name
        path.mkdir(parents=True)
        config = DeltaConfig(
            base_sha256=base, base_model_name_or_path="", codec=codec, tensors={}, files={}, provenance={"of": name}
        )  # pyright: ignore[reportArgumentType]
        (path / "delta_config.json").write_bytes(config.to_json() if text is None else text)
        (path / "delta.safetensors").write_bytes(b"x" * size)
        self.catalog.publish(path, f"acme/{name}", base_sha256=base, metadata=metadata_of(config))


@pytest.fixture
def publish(store: MemoryStore, tmp_path: Path) -> Publisher:
    return Publisher(store, tmp_path / "made")


def names(found: list[DeltaConfig]) -> list[str]:
    return [config.provenance["of"] for config in found]


def test_the_largest_of_the_commonest_codecs(repository: Repository, publish: Publisher) -> None:
    publish("once", "dense", 500)
    for i, size in enumerate((20, 90, 30)):
        publish(f"signs-{i}", "bitdelta", size)
    for i, size in enumerate((40, 50)):
        publish(f"auto-{i}", "auto", size)
    publish("stranger", "bitdelta", 900, base=OTHER_BASE)
    assert names(common_configs(repository, BASE)) == ["signs-1", "auto-1"]
    assert names(common_configs(repository, OTHER_BASE)) == ["stranger"]
    assert common_configs(repository, "2" * 64) == []


def test_an_empty_repository(repository: Repository) -> None:
    assert common_configs(repository, BASE) == []


def test_of_many_only_some_are_looked_at(
    repository: Repository, publish: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.published.LOOKED_AT", 3)
    for i in range(8):
        publish(f"v{i}", "bitdelta", 10 + i)
    asked: list[str] = []
    resolve = repository.resolve
    monkeypatch.setattr(repository, "resolve", lambda name: asked.append(name) or resolve(name))
    assert names(common_configs(repository, BASE)) == ["v6"]
    assert len(asked) == 3 <= LOOKED_AT


@pytest.mark.parametrize("text", [b"{", b'{"format_version": 1}'])
def test_a_config_that_cannot_be_read_is_told_and_left(
    repository: Repository, publish: Publisher, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    publish("bad", "bitdelta", text=text)
    assert common_configs(repository, BASE) == []
    assert "delta_config.json" in caplog.text


def test_a_blob_with_other_bytes_is_not_believed(
    repository: Repository, publish: Publisher, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    publish("x", "bitdelta")
    manifest = repository.resolve("acme/x")
    [entry] = [file for file in manifest.files if file.path == "delta_config.json"]
    body = store.read(entry.key)
    store.put(entry.key, io.BytesIO(body.replace(b"bitdelta", b"bitdelto")), len(body))
    assert common_configs(repository, BASE) == []
    assert "is not what its name says" in caplog.text


def test_a_store_that_is_down_is_told(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down() -> None:
        raise StoreUnavailable("the store is down", retry_after_s=1.0)

    monkeypatch.setattr(repository, "list_variants", down)
    with caplog.at_level(logging.WARNING):
        assert common_configs(repository, BASE) == []
    assert "the store is down" in caplog.text
