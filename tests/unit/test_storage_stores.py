"""What is particular to one store or to opening one; what all promise is in tests/contract."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path

import pytest

from storage import (
    InvalidName,
    InvalidSource,
    LocalStore,
    MemoryStore,
    NotFound,
    StoreUnavailable,
    open_store,
    repository_uri,
)
from storage.download import download
from storage.errors import CorruptBlob
from storage.fetch import Cancelled, fetch_blob
from storage.manifest import FileEntry, Manifest
from storage.s3 import S3Config, S3Store


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, uri in [
        (f"{tmp_path}/a", f"file://{tmp_path}/a"),
        (f"file://{tmp_path}/a%20b", f"file://{tmp_path}/a%20b"),
        ("./b:c", f"file://{tmp_path}/b%3Ac"),
        ("~/repo", f"file://{tmp_path}/repo"),
        ("memory://x", "memory://x"),
    ]:
        assert open_store(text).uri == uri
    assert open_store("memory://x") is open_store("memory://x")
    assert open_store("memory://x") is not open_store("memory://y")
    assert not list(tmp_path.iterdir()), "opening creates nothing"


def test_s3_uris(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for text in ("s3://bucket/a/b", "s3://bucket"):
        store = open_store(text)
        assert isinstance(store, S3Store)
        assert store.uri == text
        assert store.settle_s == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://localhost:9")
    assert open_store("s3://bucket").settle_s > 0
    assert open_store("s3://bucket/a/").uri == "s3://bucket/a"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "http://x",
        "gs://b/p",
        "s3://",
        "s3:///p",
        "s3://b?x=1",
        "s3://b/../c",
        "file://host/p",
        "file:p",
        "memory://",
    ],
)
def test_bad_uris(uri: str) -> None:
    with pytest.raises(InvalidName, match=r"expected|storage key|file URI"):
        open_store(uri)


def test_default_repository(tmp_path: Path) -> None:
    assert repository_uri("x", {"BITDELTA_REPO": "y"}) == "x"
    assert repository_uri(None, {"BITDELTA_REPO": "y"}) == "y"
    assert repository_uri(None, {"XDG_DATA_HOME": "/data"}) == "/data/bitdelta/repo"
    assert repository_uri(None, {}).endswith("/.local/share/bitdelta/repo")


def test_s3_config() -> None:
    config = S3Config.from_env(
        {"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b", "AWS_DEFAULT_REGION": "r"}
    )
    assert (config.endpoint_url, config.region) == ("http://b", "r")
    for bad in ({"addressing_style": "dns"}, {"checksums": "never"}):
        with pytest.raises(InvalidName):
            S3Config(**bad)


def test_local_errors_have_names(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidName, match="file is no directory"):
        LocalStore(tmp_path / "file")
    with pytest.raises(NotFound):
        store.read("k")
    with pytest.raises(StoreUnavailable):
        store.put_new("k", b"x")
    assert list(store.list("")) == []


def test_local_drops_what_dead_writers_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp").mkdir()
    for name, age in [("old", 2 * 24 * 3600), ("young", 60)]:
        (tmp_path / ".tmp" / name).write_bytes(b"half")
        os.utime(tmp_path / ".tmp" / name, (0, os.stat(tmp_path).st_mtime - age))
    store = LocalStore(tmp_path)
    store.put_new("k", b"x")
    assert list(store.list("")) == ["k"]
    assert [file.name for file in (tmp_path / ".tmp").iterdir()] == ["young"]


class Flaky:
    """A store whose reads break off: after `good` bytes, `times` times per range."""

    def __init__(self, store: MemoryStore, good: int, times: int) -> None:
        self._store, self._good = store, good
        self._left: dict[int, int] = {}
        self._times = times

    def read_range(self, key: str, start: int, stop: int):
        if self._left.setdefault(stop, self._times):
            self._left[stop] -= 1
            yield from self._store.read_range(key, start, min(start + self._good, stop))
            raise StoreUnavailable("cut")
        yield from self._store.read_range(key, start, stop)


def fetch(store, body: bytes, tmp_path: Path, **options) -> tuple[str, bytes]:
    with (tmp_path / "out").open("wb+") as file:
        digest = fetch_blob(store, "k", len(body), file.fileno(), **options)
    return digest, (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("nbytes", [0, 1, 99, 100, 101, 1234])
def test_fetch(tmp_path: Path, nbytes: int) -> None:
    body = os.urandom(nbytes)
    store = MemoryStore()
    store.put("k", io.BytesIO(body), nbytes)
    seen: list[int] = []
    expected = (hashlib.sha256(body).hexdigest(), body)
    assert fetch(store, body, tmp_path, range_bytes=100, on_bytes=seen.append) == expected
    assert sum(seen) == nbytes
    assert fetch(Flaky(store, good=7, times=5), body, tmp_path, range_bytes=100) == expected


def test_fetch_gives_up_without_progress(tmp_path: Path) -> None:
    store = MemoryStore()
    store.put_new("k", bytes(1000))
    with pytest.raises(StoreUnavailable, match="cut"):
        fetch(Flaky(store, good=0, times=1), bytes(1000), tmp_path, range_bytes=100)
    with pytest.raises(StoreUnavailable, match="cut"):
        fetch(Flaky(store, good=1, times=99), bytes(1000), tmp_path, range_bytes=100)


def test_fetch_of_a_shorter_blob(tmp_path: Path) -> None:
    store = MemoryStore()
    store.put_new("k", bytes(150))
    with pytest.raises(CorruptBlob):
        fetch(store, bytes(151), tmp_path, range_bytes=100)


def test_fetch_stops_when_told_and_nobody_writes_afterwards(tmp_path: Path) -> None:
    store, stop, before = MemoryStore(), threading.Event(), threading.active_count()
    store.put_new("k", bytes(1000))
    with pytest.raises(Cancelled):
        fetch(store, bytes(1000), tmp_path, range_bytes=100, stop=stop, on_bytes=lambda n: stop.set())
    assert threading.active_count() == before


def test_download_is_whole_or_absent(tmp_path: Path) -> None:
    store, sha = MemoryStore(), "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    store.put_new(f"blobs/sha256/{sha}", b"test")
    files = (FileEntry(path="a/b", sha256=sha, nbytes=4), FileEntry(path="c", sha256="0" * 64, nbytes=4))
    manifest = Manifest(owner="o", name="n", version=1, files=files, base_sha256=sha)
    with pytest.raises(NotFound):
        download(store, manifest, tmp_path / "out")
    store.put_new("blobs/sha256/" + "0" * 64, b"evil")
    with pytest.raises(CorruptBlob, match=r"\(c\)"):
        download(store, manifest, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    good = Manifest(owner="o", name="n", version=1, files=files[:1], base_sha256=sha)
    download(store, good, tmp_path / "out")
    assert (tmp_path / "out/a/b").read_bytes() == b"test"
    with pytest.raises(InvalidSource, match="not an empty directory"):
        download(store, good, tmp_path / "out")
