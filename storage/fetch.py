"""Blob to file: parallel ranged reads, written in place, hashed as the front of the file grows.

boto3's `download_file` hands every chunk through one writer thread; here each range's thread writes its own bytes
(`pwrite`), and the caller's thread hashes the ranges in order while later ones still arrive.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from storage.base import BlobStore
from storage.errors import StoreUnavailable

THREADS = 8
RANGE_BYTES = 16 << 20
MAX_RESUMES = 5
"""Of one range."""
_HASH_BYTES = 4 << 20


class Cancelled(Exception):
    """Called off, by the caller or because another part failed."""


def fetch_blob(
    store: BlobStore,
    key: str,
    nbytes: int,
    fd: int,
    *,
    stop: threading.Event | None = None,
    on_bytes: Callable[[int], None] | None = None,
    threads: int = THREADS,
    range_bytes: int = RANGE_BYTES,
) -> str:
    """Write a blob of known size into an open file, from offset 0; hex sha256 of what was written.

    `on_bytes` is called with the size of each piece, from several threads. Whatever happens, no thread writes to `fd`
    after this returns or raises, a KeyboardInterrupt included.

    Raises:
        Cancelled: `stop` was set.
        NotFound, StoreUnavailable: from the store.
        CorruptBlob: the blob is shorter than `nbytes`.
        OSError: from writing.
    """
    failed = threading.Event()

    def copy(start: int) -> None:
        end, resumed = min(start + range_bytes, nbytes), 0
        while start < end:
            begun = start
            try:
                for chunk in store.read_range(key, start, end):
                    if failed.is_set() or (stop and stop.is_set()):
                        raise Cancelled
                    _write_all(fd, chunk, start)
                    start += len(chunk)
                    if on_bytes:
                        on_bytes(len(chunk))
            except StoreUnavailable:
                # The store retries what never began; what broke off midway is taken up where it stopped.
                resumed += 1
                if start == begun or resumed > MAX_RESUMES:
                    raise

    starts = range(0, nbytes, range_bytes)
    digest = hashlib.sha256()
    if len(starts) <= 1:
        for start in starts:
            copy(start)
            _hash(digest, fd, start, nbytes)
        return digest.hexdigest()
    pool = ThreadPoolExecutor(min(threads, len(starts)), thread_name_prefix="fetch")
    try:
        futures = [pool.submit(copy, start) for start in starts]
        for start, future in zip(starts, futures, strict=True):
            future.result()
            _hash(digest, fd, start, min(start + range_bytes, nbytes))
    finally:
        failed.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return digest.hexdigest()


def _write_all(fd: int, chunk: bytes, at: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def _hash(digest: hashlib._Hash, fd: int, start: int, stop: int) -> None:
    while start < stop:
        data = os.pread(fd, min(_HASH_BYTES, stop - start), start)
        assert data, "the range was written"
        digest.update(data)
        start += len(data)
