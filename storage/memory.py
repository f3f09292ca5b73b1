"""A store in this process's memory: for trying things out, and for tests of code that takes a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from storage.base import CHUNK, Body, CheckedReader, check_key, check_prefix
from storage.errors import CorruptBlob, NotFound


class MemoryStore:
    """Blobs in a dict. Gone when the process ends; not shared with other processes."""

    settle_s = 0.0

    def __init__(self, name: str = "anonymous") -> None:
        self.uri = f"memory://{name}"
        self._blobs: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def size(self, key: str) -> int:
        return len(self._get(key)[0])

    def modified(self, key: str) -> float:
        return self._get(key)[1]

    def read(self, key: str) -> bytes:
        return self._get(key)[0]

    def read_range(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        blob, _ = self._get(key)
        if stop > len(blob):
            raise CorruptBlob(f"{self.uri}/{key} has {len(blob)} bytes, {stop} were asked for")
        for at in range(start, stop, CHUNK):
            yield blob[at : min(at + CHUNK, stop)]

    def put(self, key: str, body: Body, nbytes: int) -> None:
        check_key(key)
        blob = CheckedReader(body, nbytes).read()
        with self._lock:
            self._blobs[key] = (blob, time.time())

    def put_new(self, key: str, body: bytes) -> bool:
        check_key(key)
        with self._lock:
            return self._blobs.setdefault(key, entry := (bytes(body), time.time())) is entry

    def touch(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            if key in self._blobs:
                self._blobs[key] = (self._blobs[key][0], time.time())
            return key in self._blobs

    def list(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        with self._lock:
            keys = sorted(key for key in self._blobs if key.startswith(prefix))
        yield from keys

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._blobs.pop(key, None)

    def _get(self, key: str) -> tuple[bytes, float]:
        try:
            return self._blobs[check_key(key)]
        except KeyError:
            raise NotFound(f"{self.uri} has no blob {key!r}") from None
