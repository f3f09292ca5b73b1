"""The disk cache's directory: what is in it, what it takes up, and taking things out of it.

    lock                       held while room is made and while something is moved in or out
    blobs/<ab>/<sha256>        a whole, verified, read-only file
    deltas/<delta_sha256>/...  one delta: hard links to its blobs, under the names in its manifest
    work/<session>/...         one open cache's half-written things; its `lock` is held while the cache lives

There is no index beside the file system, so none can disagree with it: a blob is in use while its link count is above
one, recency is the delta directory's modification time, room taken is the sum of file sizes, and a lease is a shared
`flock` on the delta directory, which eviction needs exclusively and which the kernel drops when a process dies. So any
number of threads and processes of one host may share a root.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from storage.errors import CacheFull
from storage.local import sync_directory


class Lease:
    """A delta on disk that cannot be evicted before `release()`, or before the `with` block or the process ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd

    def release(self) -> None:
        """May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class CacheDir:
    """Methods that say so in their docstring are called inside `with directory.exclusive():`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs, self._deltas, self._work = root / "blobs", root / "deltas", root / "work"
        for folder in (self._blobs, self._deltas, self._work):
            folder.mkdir(parents=True, exist_ok=True)
        self._mutex = threading.Lock()
        self.session = self._work / uuid.uuid4().hex
        with self.exclusive():
            self.session.mkdir()
            self._session_fd = os.open(self.session / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._session_fd, fcntl.LOCK_EX)
            self._sweep()

    def close(self) -> None:
        with self.exclusive():
            os.close(self._session_fd)
            shutil.rmtree(self.session)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Alone in this root, among threads and processes. Held for file operations, never while bytes are moved."""
        with self._mutex, (self.root / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def blob(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256

    def delta(self, delta_sha256: str) -> Path:
        return self._deltas / delta_sha256

    def lease(self, path: Path) -> Lease | None:
        """A lease on a delta directory, if it is there."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        lease = Lease(path, fd)
        if _is_at(path, fd):
            return lease
        lease.release()  # evicted, and perhaps fetched again, before the lock was ours
        return None

    def install(self, tree: Path, delta_sha256: str) -> Lease | None:
        """Give a complete directory its name; None when another one has it already."""
        fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
        lease = Lease(self.delta(delta_sha256), fd)
        fcntl.flock(fd, fcntl.LOCK_SH)
        touch(tree)
        try:
            tree.rename(lease.path)
        except OSError:
            lease.release()
            if not lease.path.is_dir():
                raise
            return None
        sync_directory(self._deltas)
        return lease

    def land(self, part: Path, sha256: str, nbytes: int, link: Path) -> None:
        """Give a verified, synced file its name, and a link to hold it by. Exclusive."""
        blob = self.blob(sha256)
        blob.parent.mkdir(exist_ok=True)
        if size_of(blob) not in (None, nbytes):
            self.drop_blob(blob)
        if not blob.exists():
            part.rename(blob)
            sync_directory(blob.parent)
        os.link(blob, link)

    def make_room(self, nbytes: int, budget: int) -> None:
        """Remove the least recently used deltas that nobody leases until `nbytes` more fit. Exclusive.

        Raises:
            CacheFull: they cannot; nothing was removed.
        """
        if self.used() + nbytes > budget:
            self._sweep()
        with ExitStack() as locks:
            for path in self._victims(self.used() + nbytes - budget, locks):
                self.remove(path)

    def remove(self, path: Path) -> None:
        """Take a delta out, and the blobs that only it held. Exclusive."""
        blobs = self.blobs_by_inode()
        gone = self.session / f"evicted-{uuid.uuid4().hex}"
        path.rename(gone)
        inodes = {file.stat().st_ino for file in files_of(gone)}
        shutil.rmtree(gone)
        for inode in inodes & blobs.keys():
            if blobs[inode].stat().st_nlink == 1:
                blobs[inode].unlink()

    def remove_unleased(self, path: Path) -> bool:
        """The same if nobody leases it. Exclusive."""
        with ExitStack() as locks:
            if not _lock(path, locks):
                return False
            self.remove(path)
            return True

    def drop_blob(self, blob: Path) -> None:
        """Take a damaged blob out with every delta that holds it, leased or not: readers keep what they opened.
        Exclusive."""
        inode = blob.stat().st_ino
        for path in self.deltas_by_age():
            if any(file.stat().st_ino == inode for file in files_of(path)):
                self.remove(path)
        blob.unlink(missing_ok=True)

    def drop_unlinked(self) -> None:
        """Delete blobs that no delta and nobody's unfinished work holds. Exclusive."""
        for blob in self.blobs_by_inode().values():
            if blob.stat().st_nlink == 1:
                blob.unlink()

    def used(self) -> int:
        """Bytes of blobs and of files reserved by any session. Exclusive."""
        parts = (file for file in self._work.glob("*/*/part-*"))
        return sum(size_of(file) or 0 for file in (*self.blobs_by_inode().values(), *parts))

    def blobs_by_inode(self) -> dict[int, Path]:
        return {file.stat().st_ino: file for file in self._blobs.glob("*/*")}

    def deltas_by_age(self) -> list[Path]:
        """Least recently used first."""
        return sorted(self._deltas.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name))

    def check_integrity(self) -> None:
        """Assert that blobs and deltas agree and that this session left nothing behind. Exclusive."""
        blobs = self.blobs_by_inode()
        linked: set[int] = set()
        for file in (file for path in self.deltas_by_age() for file in files_of(path)):
            assert file.stat().st_ino in blobs, f"{file} is not a link to a blob"
            linked.add(file.stat().st_ino)
        assert linked == set(blobs), f"blobs in no delta: {[blobs[i] for i in set(blobs) - linked]}"
        assert all(blob.parent.name == blob.name[:2] for blob in blobs.values()), "a blob is misplaced"
        left = [path.name for path in self.session.iterdir() if path.name != "lock"]
        assert not left, f"left in {self.session}: {left}"

    def _victims(self, excess: int, locks: ExitStack) -> list[Path]:
        victims: list[Path] = []
        holders: dict[int, int] = {}
        for path in self.deltas_by_age() if excess > 0 else ():
            if not _lock(path, locks):
                continue
            victims.append(path)
            for stat in (file.stat() for file in files_of(path)):
                holders[stat.st_ino] = holders.get(stat.st_ino, stat.st_nlink) - 1
                if holders[stat.st_ino] == 1:  # only its name under blobs/ is left
                    excess -= stat.st_size
            if excess <= 0:
                break
        if excess > 0:
            raise CacheFull(
                f"{self.root}: {excess} more bytes are needed than deltas out of use hold", retry_after_s=5.0
            )
        return victims

    def _sweep(self) -> None:
        """Remove what dead sessions were writing. Exclusive."""
        for session in self._work.iterdir():
            if session != self.session and _is_dead(session):
                shutil.rmtree(session)
        self.drop_unlinked()


def touch(path: Path) -> None:
    """Mark as used now, finer than the kernel's own clock tick."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if not file.is_dir()]


def sha256_of(path: Path) -> str | None:
    """None when it is gone."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _is_at(path: Path, fd: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(fd))
    return False


def _lock(path: Path, locks: ExitStack) -> bool:
    """Keep others from leasing a delta until `locks` closes; False when somebody leases it or it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    locks.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_dead(session: Path) -> bool:
    try:
        with (session / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True  # died between making the directory and its lock, both under the root's lock
    except BlockingIOError:
        return False
    return True
