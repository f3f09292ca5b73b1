"""The disk cache against a model of it: leases, evictions, failures, damage, crashes and a second process's view."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from storage import CacheFull, CorruptBlob, DiskCache, FileEntry, Lease, Manifest, StoreUnavailable

BUDGET = 1000
# Content is a function of (seed, size); several deltas share blobs, one has a blob twice, one fits only when alone.
BLOBS = {
    name: bytes([i]) * size for i, (name, size) in enumerate([("a", 300), ("b", 250), ("c", 400), ("d", 1), ("e", 0)])
}
BLOBS["huge"] = b"\xff" * 900
DELTAS = {
    "one": ("a", "d"),
    "two": ("b", "d"),
    "three": ("c", "d", "e"),
    "shares": ("a", "b"),
    "twice": ("c", "c"),
    "big": ("huge", "d"),
    "mixed": ("a", "c", "b"),
}


def manifest_of(name: str) -> Manifest:
    entries = tuple(
        FileEntry(
            path=f"f{i}/{blob}" if i else blob, sha256=hashlib.sha256(BLOBS[blob]).hexdigest(), nbytes=len(BLOBS[blob])
        )
        for i, blob in enumerate(DELTAS[name])
    )
    return Manifest(owner="acme", name=name, version=1, files=entries, base_sha256="0" * 64)


MANIFESTS = {name: manifest_of(name) for name in DELTAS}
BY_HASH = {hashlib.sha256(body).hexdigest(): body for body in BLOBS.values()}


def good(entry: FileEntry, fd: int, stop: threading.Event) -> str:
    os.pwrite(fd, BY_HASH[entry.sha256], 0)
    return entry.sha256


def unavailable(entry: FileEntry, fd: int, stop: threading.Event) -> str:
    os.pwrite(fd, BY_HASH[entry.sha256][:10], 0)
    raise StoreUnavailable("down")


def corrupt(entry: FileEntry, fd: int, stop: threading.Event) -> str:
    body = BY_HASH[entry.sha256] + b"!" if entry.nbytes == 0 else bytes(entry.nbytes)
    os.pwrite(fd, body, 0)
    return hashlib.sha256(body).hexdigest()


def interrupted(entry: FileEntry, fd: int, stop: threading.Event) -> str:
    raise KeyboardInterrupt


FAILURES = {unavailable: StoreUnavailable, corrupt: CorruptBlob, interrupted: KeyboardInterrupt}


def holds(path: Path, name: str) -> bool:
    """Whether the directory holds exactly this variant's files: never another's."""
    found = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    return found == {entry.path: BY_HASH[entry.sha256] for entry in MANIFESTS[name].files}


class CacheMachine(RuleBasedStateMachine):
    leases = Bundle("leases")

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="disk-cache-"))
        self.caches = [DiskCache(self.root, BUDGET)]
        self.leased: dict[Lease, str] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(name=st.sampled_from(sorted(DELTAS)), which=st.integers(0, 1), target=leases)
    def lease(self, name: str, which: int):
        cache = self.caches[which % len(self.caches)]
        try:
            lease = cache.lease(MANIFESTS[name], good)
        except CacheFull as full:
            assert self.needed(name) > BUDGET, "it would have fitted beside what is leased"
            assert full.retry_after_s  # noqa: PT017
            return multiple()
        assert holds(lease.path, name)
        self.leased[lease] = name
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        lease.release()
        del self.leased[lease]

    @rule(name=st.sampled_from(sorted(DELTAS)), fetch=st.sampled_from(list(FAILURES)))
    def fail(self, name: str, fetch) -> None:
        cache = self.caches[0]
        missing = MANIFESTS[name] not in cache
        try:
            cache.get(MANIFESTS[name], fetch)
        except CacheFull:
            assert self.needed(name) > BUDGET
        except FAILURES[fetch]:
            assert missing
        else:
            # Nothing was fetched: all of its blobs were there.
            assert holds(cache.root / "deltas" / MANIFESTS[name].delta_sha256, name)

    @rule(name=st.sampled_from(sorted(DELTAS)))
    def evict(self, name: str) -> None:
        leased = name in self.leased.values()
        there = MANIFESTS[name] in self.caches[0]
        assert self.caches[0].evict(MANIFESTS[name]) == (there and not leased)

    @rule(data=st.data(), keep=st.booleans())
    def damage(self, data: st.DataObject, keep: bool) -> None:
        """A blob loses its end, or rots in place. Found by size at the next use, or by `verify`."""
        blobs = sorted(file for file in self.root.glob("blobs/*/*") if file.stat().st_size)
        if not blobs or self.leased:
            return
        blob = data.draw(st.sampled_from(blobs))
        blob.chmod(0o644)
        blob.write_bytes(bytes(x ^ 1 for x in blob.read_bytes())[: None if keep else -1])
        if keep:
            assert self.caches[0].verify() == [blob.name]
        else:
            for name in DELTAS:
                if MANIFESTS[name] in self.caches[0] and any(e.sha256 == blob.name for e in MANIFESTS[name].files):
                    with self.caches[0].lease(MANIFESTS[name], good) as path:
                        assert holds(path, name)

    @rule()
    def second_process(self) -> None:
        """Another cache on the same root, as another process would open it."""
        if len(self.caches) == 1:
            self.caches.append(DiskCache(self.root, BUDGET))

    @precondition(lambda self: not self.leased)
    @rule(halfway=st.sampled_from(["reserved", "landed", "assembled", "evicting"]))
    def crash(self, halfway: str) -> None:
        """Every process dies in the middle of something; the kernel drops its locks and nothing tidies up."""
        session = self.caches[0]._directory.session
        (session / "delta-x").mkdir()
        match halfway:
            case "reserved":
                (session / "delta-x" / "part-1").write_bytes(b"half")
            case "landed":
                orphan = self.root / "blobs" / "00" / ("0" * 64)
                orphan.parent.mkdir(exist_ok=True)
                orphan.write_bytes(bytes(BUDGET))
            case "assembled":
                (session / "delta-x" / "tree").mkdir()
                for blob in self.root.glob("blobs/*/*"):
                    os.link(blob, session / "delta-x" / "tree" / blob.name)
            case "evicting":
                for delta in list((self.root / "deltas").iterdir())[:1]:
                    delta.rename(session / "evicted-1")
        for cache in self.caches:
            os.close(cache._directory._session_fd)
        self.caches = [DiskCache(self.root, BUDGET)]

    @precondition(lambda self: len(self.caches) == 2)
    @rule()
    def close_second(self) -> None:
        self.caches.pop().close()

    @invariant()
    def sound(self) -> None:
        for cache in self.caches:
            cache.check_integrity()
        for lease, name in self.leased.items():
            assert holds(lease.path, name), "a leased delta was evicted"

    def needed(self, name: str) -> int:
        """Bytes that must be on disk at once for this lease."""
        entries = {e.sha256: e.nbytes for n in {name, *self.leased.values()} for e in MANIFESTS[n].files}
        return sum(entries.values())


CacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestCache = pytest.mark.filterwarnings("error")(CacheMachine.TestCase)
