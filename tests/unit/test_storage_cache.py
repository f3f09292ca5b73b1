"""The disk cache under threads, processes that are killed, and full disks; its rules are in tests/properties."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import CacheFull, DiskCache, FileEntry, Manifest, StoreUnavailable
from storage.fetch import Cancelled


def body_of(name: str, nbytes: int) -> bytes:
    return hashlib.sha256(name.encode()).digest() * (nbytes // 32)


def make(name: str, *sizes: int) -> tuple[Manifest, dict[str, bytes]]:
    bodies = [body_of(f"{name}{i}", size) for i, size in enumerate(sizes)]
    by_hash = {hashlib.sha256(body).hexdigest(): body for body in bodies}
    files = tuple(
        FileEntry(path=f"f{i}", sha256=sha, nbytes=len(body)) for i, (sha, body) in enumerate(by_hash.items())
    )
    return Manifest(owner="acme", name=name, version=1, files=files, base_sha256="0" * 64), by_hash


def filler(bodies: dict[str, bytes], before: Callable[[], object] = lambda: None):
    def fetch(entry: FileEntry, fd: int, stop: threading.Event) -> str:
        before()
        os.pwrite(fd, bodies[entry.sha256], 0)
        return entry.sha256

    return fetch


def never(entry: FileEntry, fd: int, stop: threading.Event) -> str:
    raise AssertionError("this should have been in the cache")


def test_least_recently_used_leaves_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3 * 320)
    made = {name: make(name, 320) for name in "abcd"}
    for name in "abc":
        cache.get(made[name][0], filler(made[name][1]))
    cache.get(made["a"][0], never)
    cache = DiskCache(tmp_path, 3 * 320)  # a restart remembers the order
    cache.get(made["d"][0], filler(made["d"][1]))
    assert [name for name in "abcd" if made[name][0] in cache] == ["a", "c", "d"]
    assert DiskCache(tmp_path, 320).stats().deltas == 1, "a smaller budget is kept from the start"


def test_no_eviction_when_it_would_not_be_enough(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    (a, a_bodies), (b, b_bodies), (c, c_bodies) = make("a", 640), make("b", 320), make("c", 960)
    cache.get(b, filler(b_bodies))
    with cache.lease(a, filler(a_bodies)):
        with pytest.raises(CacheFull) as caught:
            cache.get(c, filler(c_bodies))
        assert caught.value.retry_after_s
        assert b in cache
    cache.get(c, filler(c_bodies))
    with pytest.raises(CacheFull, match="budget is 1000") as caught:
        cache.get(make("huge", 1024)[0], never)
    assert caught.value.retry_after_s is None


def test_one_fetch_per_blob_however_many_ask(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    manifest, bodies = make("a", 320, 640)
    calls: list[str] = []
    gate = threading.Barrier(8)

    def fetch(entry: FileEntry, fd: int, stop: threading.Event) -> str:
        calls.append(entry.sha256)
        return filler(bodies)(entry, fd, stop)

    def lease(_: int) -> bytes:
        gate.wait()
        with cache.lease(manifest, fetch) as path:
            return (path / "f0").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lease, range(8))) == {bodies[manifest.files[0].sha256]}
    assert sorted(calls) == sorted(bodies)
    cache.check_integrity()


def test_a_failure_is_heard_by_all_and_forgotten(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    manifest, bodies = make("a", 320)
    waiting = threading.Semaphore(0)

    def fail(entry: FileEntry, fd: int, stop: threading.Event) -> str:
        waiting.acquire(timeout=10)
        raise StoreUnavailable("down")

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cache.get, manifest, fail) for _ in range(4)]
        waiting.release(4)
        assert all(isinstance(future.exception(), StoreUnavailable) for future in futures)
    cache.check_integrity()
    cache.get(manifest, filler(bodies))


def test_those_who_wait_for_a_fetch_that_is_called_off_fetch_themselves(tmp_path: Path) -> None:
    """Two variants share a file; the first one's fetch fails on another file, which calls the shared one off."""
    cache = DiskCache(tmp_path, 10_000)
    shared, shared_bodies = make("shared", 320)
    both = Manifest(
        owner="acme",
        name="both",
        version=1,
        files=(*shared.files, FileEntry(path="bad", sha256="f" * 64, nbytes=5)),
        base_sha256="0" * 64,
    )
    begun, fail_now = threading.Event(), threading.Event()

    def fetch_both(entry: FileEntry, fd: int, stop: threading.Event) -> str:
        if entry.path == "bad":
            fail_now.wait(10)
            raise StoreUnavailable("down")
        begun.set()
        stop.wait(10)
        raise Cancelled

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, both, fetch_both)
        begun.wait(10)
        second = pool.submit(cache.get, shared, filler(shared_bodies))
        fail_now.set()
        assert isinstance(first.exception(), StoreUnavailable)
        assert (second.result() / "f0").read_bytes() == next(iter(shared_bodies.values()))
    cache.check_integrity()


def test_popularity_mixes_under_threads(tmp_path: Path) -> None:
    """Many threads, a budget for a third of the variants: each thread reads its own variant's bytes, always."""
    made = [make(f"v{i}", 320, 64 * (i + 1)) for i in range(9)]
    cache = DiskCache(tmp_path, 2200)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            manifest, bodies = made[min(int(rng.paretovariate(1.0)) - 1, 8)]
            try:
                with cache.lease(manifest, filler(bodies)) as path:
                    for entry in manifest.files:
                        assert (path / entry.path).read_bytes() == bodies[entry.sha256]
            except CacheFull:
                continue  # the others lease too much just now

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    cache.check_integrity()
    assert cache.verify() == []


def test_disk_full(tmp_path: Path) -> None:
    def fetch(entry: FileEntry, fd: int, stop: threading.Event) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = DiskCache(tmp_path, 10_000)
    with pytest.raises(CacheFull, match="the disk is full"):
        cache.get(make("a", 320)[0], fetch)
    cache.check_integrity()


CHILD = """
import sys, time
from storage import DiskCache
from tests.unit.test_storage_cache import filler, make

cache = DiskCache(sys.argv[1], 2000)
leased, bodies = make("leased", 640)
lease = cache.lease(leased, filler(bodies))
other, bodies = make("other", 640)
def hang():
    print("fetching", flush=True)
    time.sleep(600)
cache.lease(other, filler(bodies, hang))
"""


def test_a_killed_process_leaves_no_locks_and_no_halves(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout
        assert child.stdout.readline() == b"fetching\n"
        cache = DiskCache(tmp_path, 2000)
        assert cache.stats().nbytes == 1280, "what another process is fetching is reserved"
        leased, _ = make("leased", 640)
        big, big_bodies = make("big", 1920)
        assert not cache.evict(leased), "another process leases it"
        with pytest.raises(CacheFull):
            cache.get(big, filler(big_bodies))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stdout
        child.stdout.close()
    cache.get(leased, never)
    cache.get(big, filler(big_bodies))
    assert leased not in cache
    cache.check_integrity()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [cache._directory.session.name]
