"""Names to directories: what is remembered, for how long, and what still works while the store is down or slow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import storage
from storage import (
    Catalog,
    CorruptBlob,
    DiskCache,
    InvalidName,
    Manifest,
    MemoryStore,
    NotFound,
    Repository,
    StoreUnavailable,
)

BASE = "0" * 64


class Switchable:
    """A store that can be switched off, or made to hang until it is switched on again."""

    def __init__(self) -> None:
        self.inner = MemoryStore("switchable")
        self.uri, self.settle_s = self.inner.uri, 0.0
        self.down = False
        self.hanging: threading.Event | None = None
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        method = getattr(self.inner, name)

        def call(*args):
            self.calls.append(name)
            if self.hanging:
                self.hanging.wait(10)
            if self.down:
                raise StoreUnavailable("the store is down", retry_after_s=3.0)
            return method(*args)

        return call


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> Switchable:
    return Switchable()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def repository(store: Switchable, tmp_path: Path, clock: Clock) -> Repository:
    return Repository(store, DiskCache(tmp_path / "cache", 10_000), clock=clock)


@pytest.fixture
def publish(store: Switchable, tmp_path: Path) -> Callable[..., Manifest]:
    def publish(text: str, name: str = "acme/x") -> Manifest:
        directory = tmp_path / f"made-{text}"
        directory.mkdir()
        (directory / "delta.safetensors").write_text(text)
        return Catalog(store.inner).publish(directory, name, base_sha256=BASE)

    return publish


def read(path: Path) -> str:
    return (path / "delta.safetensors").read_text()


def test_changes_are_seen_within_the_time_to_live(
    repository: Repository, publish: Callable[..., Manifest], clock: Clock, store: Switchable
) -> None:
    with pytest.raises(NotFound):
        repository.resolve("acme/x")
    one = publish("one")
    with pytest.raises(NotFound):
        repository.resolve("acme/x")
    clock.now = 0.6
    assert repository.resolve("acme/x") == one
    assert [info.path for info in repository.list_variants()] == ["acme/x"]
    two = publish("two")
    assert repository.resolve("acme/x") == one
    clock.now += 2.1
    assert repository.resolve("acme/x") == two
    asked = len(store.calls)
    assert repository.resolve("acme/x") == two
    assert len(store.calls) == asked
    with pytest.raises(InvalidName):
        repository.resolve("acme")


def test_each_variant_gets_its_own_files(repository: Repository, publish: Callable[..., Manifest]) -> None:
    names = {f"acme/v{i}": publish(f"text {i}", f"acme/v{i}") for i in range(5)}
    for name in names:
        with repository.lease(repository.resolve(name)) as path:
            assert read(path) == f"text {name[-1]}"
        assert read(repository.fetch(repository.resolve(f"{name}@1"))) == f"text {name[-1]}"


def test_equal_files_share_the_disk(repository: Repository, publish: Callable[..., Manifest], tmp_path: Path) -> None:
    one = publish("same", "acme/x")
    two = Catalog(repository.store).publish(tmp_path / "made-same", "acme/y", base_sha256=BASE)
    assert repository.fetch(one) == repository.fetch(two)
    assert repository.cache.stats().nbytes == len("same")


def test_progress(repository: Repository, publish: Callable[..., Manifest]) -> None:
    manifest, seen = publish("x" * 100), []
    repository.fetch(manifest, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (100, 100)
    assert seen == sorted(seen)
    seen.clear()
    repository.fetch(manifest, lambda done, total: seen.append((done, total)))
    assert seen == [(100, 100)]


def test_a_corrupt_blob_names_its_file(
    repository: Repository, publish: Callable[..., Manifest], store: Switchable
) -> None:
    good, bad = publish("good", "acme/good"), publish("bad", "acme/bad")
    store.inner.delete(bad.files[0].key)
    store.inner.put_new(bad.files[0].key, b"bat")
    with pytest.raises(CorruptBlob, match=r"delta\.safetensors"):
        repository.fetch(bad)
    assert read(repository.fetch(good)) == "good"
    store.inner.delete(bad.files[0].key)
    store.inner.put_new(bad.files[0].key, b"bad")
    assert read(repository.fetch(bad)) == "bad"
    repository.cache.check_integrity()


def test_while_the_store_is_down(
    repository: Repository,
    publish: Callable[..., Manifest],
    clock: Clock,
    store: Switchable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cached, cold = publish("cached"), publish("cold", "acme/cold")
    repository.fetch(repository.resolve("acme/x"))
    repository.list_variants()
    with pytest.raises(NotFound):
        repository.resolve("acme/later")
    store.down = True
    clock.now = 100
    with caplog.at_level(logging.WARNING):
        assert repository.resolve("acme/x") == cached
    assert "the store is down; acme/x is answered from memory, 100 s old" in caplog.text
    assert [info.path for info in repository.list_variants()] == ["acme/cold", "acme/x"]
    assert read(repository.fetch(cached)) == "cached"
    asked = len(store.calls)
    for name in ("acme/cold", "acme/later"):
        with pytest.raises(StoreUnavailable) as caught:
            repository.resolve(name)
        assert caught.value.retry_after_s == 3.0
    assert len(store.calls) == asked, "it was asked a moment ago"
    with pytest.raises(StoreUnavailable):
        repository.fetch(cold)
    clock.now = 3601
    with pytest.raises(StoreUnavailable):
        repository.resolve("acme/x")
    store.down = False
    clock.now = 3604
    assert repository.resolve("acme/x") == cached
    repository.cache.check_integrity()


def test_while_the_store_hangs(
    repository: Repository, publish: Callable[..., Manifest], clock: Clock, store: Switchable
) -> None:
    manifest = publish("x")
    repository.resolve("acme/x")
    store.hanging = threading.Event()
    clock.now = 10
    began = time.monotonic()
    assert repository.resolve("acme/x") == manifest  # waits for half a second
    clock.now = 20
    for _ in range(20):
        assert repository.resolve("acme/x") == manifest  # nobody waits again for the same answer
    assert time.monotonic() - began < 5
    store.hanging.set()


def test_one_lookup_however_many_ask(
    repository: Repository, publish: Callable[..., Manifest], store: Switchable
) -> None:
    manifest = publish("x")
    store.hanging = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(repository.resolve, "acme/x") for _ in range(8)]
        while not store.calls:
            time.sleep(0.001)
        store.hanging.set()
        assert {future.result().model_id for future in futures} == {manifest.model_id}
    assert store.calls.count("list") == 1


def test_exported_names_are_sorted_and_exist() -> None:
    assert storage.__all__ == sorted(storage.__all__)
    assert all(hasattr(storage, name) for name in storage.__all__)


def test_importing_storage_imports_neither_torch_nor_boto3() -> None:
    import subprocess
    import sys

    code = "import sys, storage; sys.exit(bool({'torch', 'boto3', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
