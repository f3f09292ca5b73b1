"""The disk tier: deltas as directories, under a byte budget, the least recently used leaving first.

A blob goes ABSENT -> `work/` (written, hashed, synced) -> `blobs/`, a delta ABSENT -> `work/` (links to all its blobs)
-> `deltas/`, each by one rename; so a reader, or a start after a crash or power cut, finds a thing whole or not at all.

Not covered: network file systems, and bytes that rot in place after they were verified (`verify` finds those on
request; a changed size is found at every use).
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from storage.cache_dir import CacheDir, Lease, sha256_of, size_of, touch
from storage.errors import CacheFull, CorruptBlob, StoreUnavailable
from storage.fetch import Cancelled
from storage.local import sync_directory
from storage.manifest import FileEntry, Manifest

Fetch = Callable[[FileEntry, int, threading.Event], str]
"""Writes the file's bytes into an open descriptor and returns their hex sha256; raises Cancelled soon after the event
is set."""
_PARALLEL_FILES = 4
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What is on disk now."""

    nbytes: int
    budget_bytes: int
    deltas: int
    blobs: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """One fetch under way: the reserved file it goes into, and what others wait for."""

    entry: FileEntry
    part: Path
    landed: Future[None]


class DiskCache:
    """Deltas on local disk. Threads share an instance; processes of one host may share the root."""

    def __init__(self, root: str | os.PathLike[str], budget_bytes: int) -> None:
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be positive, got {budget_bytes}")
        self.root = Path(root).expanduser().absolute()
        self.budget_bytes = budget_bytes
        self._directory = CacheDir(self.root)
        with self._directory.exclusive():
            self._directory.make_room(0, budget_bytes)
        self._flights: dict[str, _Flight] = {}

    def close(self) -> None:
        """Drop what was being written. Leases stay valid; the cache cannot be used again."""
        self._directory.close()

    def lease(self, manifest: Manifest, fetch: Fetch) -> Lease:
        """The delta's directory, fetched if it is not there, and kept until the lease is released.

        Blocks. One fetch per blob at a time, however many threads ask.

        Raises:
            CacheFull: it does not fit, or not beside what is leased now (retry_after_s), or the disk is full.
            CorruptBlob: what was fetched does not have the size or hash that the manifest promises.
            StorageError: whatever `fetch` raises.
        """
        unique = {entry.sha256: entry.nbytes for entry in manifest.files}
        if sum(unique.values()) > self.budget_bytes:
            raise CacheFull(
                f"{manifest.model_id} has {sum(unique.values())} bytes, the disk cache's budget is {self.budget_bytes}"
            )
        for _ in range(_ATTEMPTS):
            try:
                lease = self._find(manifest) or self._build(manifest, fetch)
            except OSError as error:
                raise self._named(error) from error
            if lease is not None:
                return lease
        raise StoreUnavailable(f"{self.root}: {manifest.model_id} vanishes while it is fetched", retry_after_s=1.0)

    def get(self, manifest: Manifest, fetch: Fetch) -> Path:
        """The same without a lease: the directory may be evicted from now on (files already open stay readable)."""
        with self.lease(manifest, fetch) as path:
            return path

    def __contains__(self, manifest: Manifest) -> bool:
        return self._directory.delta(manifest.delta_sha256).is_dir()

    def evict(self, manifest: Manifest) -> bool:
        """Drop one delta now; False when it is not there or is leased."""
        with self._directory.exclusive():
            return self._directory.remove_unleased(self._directory.delta(manifest.delta_sha256))

    def stats(self) -> CacheStats:
        """Counted from the file system."""
        directory = self._directory
        with directory.exclusive():
            return CacheStats(
                directory.used(), self.budget_bytes, len(directory.deltas_by_age()), len(directory.blobs_by_inode())
            )

    def verify(self) -> list[str]:
        """Read and hash every blob; what is wrong is dropped with the deltas that hold it. The dropped sha256s."""
        with self._directory.exclusive():
            blobs = list(self._directory.blobs_by_inode().values())
        wrong = [blob for blob in blobs if sha256_of(blob) not in (None, blob.name)]
        with self._directory.exclusive():
            for blob in filter(Path.exists, wrong):
                self._directory.drop_blob(blob)
        return sorted(blob.name for blob in wrong)

    def check_integrity(self) -> None:
        """Assert what holds whenever no call is in progress in any thread or process (hashes: `verify`)."""
        with self._directory.exclusive():
            used = self._directory.used()
            assert used <= self.budget_bytes, f"{used} bytes where {self.budget_bytes} are allowed"
            assert not self._flights, f"in flight: {list(self._flights)}"
            self._directory.check_integrity()

    def _find(self, manifest: Manifest) -> Lease | None:
        """A lease on the directory if it is there and whole; a damaged one is dropped."""
        lease = self._directory.lease(self._directory.delta(manifest.delta_sha256))
        if lease is None:
            return None
        damaged = [entry for entry in manifest.files if size_of(lease.path / entry.path) != entry.nbytes]
        if not damaged:
            touch(lease.path)
            return lease
        lease.release()
        self._discard(lease.path, damaged)
        return None

    def _discard(self, path: Path, damaged: Sequence[FileEntry]) -> None:
        with self._directory.exclusive():
            for entry in damaged:
                blob = self._directory.blob(entry.sha256)
                if size_of(blob) not in (None, entry.nbytes):
                    self._directory.drop_blob(blob)
            if any(size_of(path / entry.path) != entry.nbytes for entry in damaged) and path.is_dir():
                self._directory.remove(path)

    def _build(self, manifest: Manifest, fetch: Fetch) -> Lease | None:
        """Fetch what is missing and assemble the directory; None when something was taken away meanwhile."""
        staging = self._directory.session / f"delta-{uuid.uuid4().hex}"
        staging.mkdir()
        mine: list[_Flight] = []
        lease = None
        try:
            theirs = self._plan(manifest, staging, mine)
            self._fetch_all(mine, staging, fetch)
            if _all_landed(theirs) and self._assemble(manifest, staging):
                lease = self._directory.install(staging / "tree", manifest.delta_sha256)
            return lease
        finally:
            self._abandon(mine)
            with self._directory.exclusive():  # others count what is reserved here
                shutil.rmtree(staging)
                if lease is None:
                    self._directory.drop_unlinked()

    def _plan(self, manifest: Manifest, staging: Path, mine: list[_Flight]) -> list[_Flight]:
        """Link what is here, so that it stays; make room for the rest and reserve it as empty files of full size.

        Fills `mine` with what this call has to fetch; returns the fetches of others that it has to wait for.
        """
        directory = self._directory
        with directory.exclusive():
            theirs, missing = [], []
            for entry in {entry.sha256: entry for entry in manifest.files}.values():
                if (flight := self._flights.get(entry.sha256)) is not None:
                    theirs.append(flight)
                elif size_of(directory.blob(entry.sha256)) == entry.nbytes:
                    os.link(directory.blob(entry.sha256), staging / entry.sha256)
                else:
                    missing.append(entry)
            directory.make_room(sum(entry.nbytes for entry in missing), self.budget_bytes)
            mine.extend(_reserve(entry, staging) for entry in missing)
            self._flights.update((flight.entry.sha256, flight) for flight in mine)
            return theirs

    def _fetch_all(self, mine: Sequence[_Flight], staging: Path, fetch: Fetch) -> None:
        """Several files at a time; the first failure or an interruption calls the others off."""
        if not mine:
            return
        stop = threading.Event()
        with ThreadPoolExecutor(min(_PARALLEL_FILES, len(mine)), thread_name_prefix="fetch-file") as pool:
            try:
                futures = [pool.submit(self._fetch_one, flight, staging, fetch, stop) for flight in mine]
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            finally:
                stop.set()

    def _fetch_one(self, flight: _Flight, staging: Path, fetch: Fetch, stop: threading.Event) -> None:
        """Fetch one blob, and tell whoever else waits for it."""
        entry = flight.entry
        try:
            if stop.is_set():
                raise Cancelled
            _write(flight, fetch, stop)
            with self._directory.exclusive():
                self._directory.land(flight.part, entry.sha256, entry.nbytes, staging / entry.sha256)
                del self._flights[entry.sha256]
        except Exception as error:
            self._ground(flight, self._named(error) if isinstance(error, OSError) else error)
            raise
        flight.landed.set_result(None)

    def _assemble(self, manifest: Manifest, staging: Path) -> bool:
        """Make `tree`, the directory as its readers see it; False when a blob that another call fetched has gone."""
        tree = staging / "tree"
        for entry in manifest.files:
            held = staging / entry.sha256
            if not held.exists():
                try:
                    os.link(self._directory.blob(entry.sha256), held)
                except FileNotFoundError:
                    return False
            target = tree / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(held, target)
        for folder in (tree, *(path for path in tree.rglob("*") if path.is_dir())):
            sync_directory(folder)
        return True

    def _abandon(self, mine: Sequence[_Flight]) -> None:
        """After an interruption: nobody shall wait for what this call will not fetch."""
        for flight in mine:
            if not flight.landed.done():
                self._ground(flight, Cancelled())

    def _ground(self, flight: _Flight, error: Exception) -> None:
        with self._directory.exclusive():
            if self._flights.get(flight.entry.sha256) is flight:
                del self._flights[flight.entry.sha256]
        flight.landed.set_exception(error)

    def _named(self, error: OSError) -> CacheFull | StoreUnavailable:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CacheFull(f"{self.root}: the disk is full", retry_after_s=30.0)
        return StoreUnavailable(f"{self.root}: the disk cache failed: {error}")


def _reserve(entry: FileEntry, staging: Path) -> _Flight:
    part = staging / f"part-{entry.sha256}"
    with part.open("xb") as file:
        file.truncate(entry.nbytes)
    return _Flight(entry, part, Future())


def _write(flight: _Flight, fetch: Fetch, stop: threading.Event) -> None:
    entry = flight.entry
    with flight.part.open("r+b") as file:
        digest = fetch(entry, file.fileno(), stop)
        nbytes = os.fstat(file.fileno()).st_size
        if (digest, nbytes) != (entry.sha256, entry.nbytes):
            arrived = f"{nbytes} bytes and sha256 {digest} arrived, {entry.nbytes} bytes were promised"
            raise CorruptBlob(f"{entry.key} ({entry.path}): {arrived}")
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())


def _all_landed(theirs: Sequence[_Flight]) -> bool:
    """Whether the fetches of others succeeded. Their errors are ours, but not that they were called off."""
    try:
        for flight in theirs:
            flight.landed.result()
    except Cancelled:
        return False
    return True
