"""The seam under everything in this package: a store of named blobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Protocol

from storage.errors import CorruptBlob, InvalidName

CHUNK = 1 << 20
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,254}")


class Body(Protocol):
    """What can be uploaded: a binary file, or anything that reads like one."""

    def read(self, size: int = ..., /) -> bytes: ...


class BlobStore(Protocol):
    """Keys are `/`-separated, relative, without `.` or `..` parts. All methods block and are safe to call from threads.

    Raises NotFound, StoreUnavailable, and InvalidName for a bad key; never a boto3 or OS error.
    """

    uri: str
    """How a user would name this store: `s3://bucket/prefix`, `file:///dir`, `memory://name`."""
    settle_s: float
    """How long two racing `put_new` of one key may both look like winners. 0: put_new is atomic."""

    def size(self, key: str) -> int:
        """Bytes of the blob; NotFound when there is none."""
        ...

    def modified(self, key: str) -> float:
        """Unix time at which the blob was last put or touched; NotFound when there is none."""
        ...

    def read(self, key: str) -> bytes:
        """The whole of a small blob."""
        ...

    def read_range(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start..stop (exclusive) in chunks. Errors come with the first chunk.

        Raises:
            CorruptBlob: the blob ends before `stop`.
        """
        ...

    def put(self, key: str, body: Body, nbytes: int) -> None:
        """Store, replacing what was there. All or nothing: no reader ever sees half a blob, and an error raised by
        `body.read` (or a body that is not `nbytes` long: CorruptBlob) leaves the store as it was."""
        ...

    def put_new(self, key: str, body: bytes) -> bool:
        """Create a small blob; False when the key already exists (or somebody else won the race)."""
        ...

    def touch(self, key: str) -> bool:
        """Make the blob as young as one just put, without sending its bytes; False when there is none."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with the string `prefix`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove; a missing key is not an error."""
        ...


def check_key(key: str) -> str:
    """The key itself, or InvalidName."""
    if len(key) > 900 or not all(_PART.fullmatch(part) for part in key.split("/")):
        raise InvalidName(
            f"{key!r} is not a storage key: relative parts of [A-Za-z0-9._=+-] joined by '/' are expected"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself, or InvalidName: the beginning of some valid key."""
    if prefix:
        check_key(prefix + "x" if prefix.endswith("/") else prefix)
    return prefix


class CheckedReader:
    """A body that is read once, front to back, and that refuses to end well unless it is what was announced.

    Stores commit only after `read` has returned the last byte, so raising there keeps a file that changed under an
    upload from being stored under the hash of what it used to be.
    """

    def __init__(
        self, body: Body, nbytes: int, *, sha256: str | None = None, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        self._body = body
        self._nbytes = nbytes
        self._sha256 = sha256
        self._on_bytes = on_bytes
        self._hash = hashlib.sha256()
        self._seen = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes, fewer only at the end.

        Raises:
            CorruptBlob: more or fewer bytes than announced, or another hash.
        """
        wanted = self._nbytes + 1 - self._seen if size is None or size < 0 else size
        data = self._fill(wanted)
        self._seen += len(data)
        if self._sha256:
            self._hash.update(data)
        if self._seen >= self._nbytes or len(data) < wanted:
            self._check_end()
        if self._on_bytes and data:
            self._on_bytes(len(data))
        return data

    def _fill(self, wanted: int) -> bytes:
        parts: list[bytes] = []
        while wanted > 0 and (part := self._body.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def _check_end(self) -> None:
        extra = len(self._body.read(1)) if self._seen == self._nbytes else 0
        if self._seen + extra != self._nbytes:
            than = "more" if self._seen + extra > self._nbytes else f"{self._seen}"
            raise CorruptBlob(f"the body has {than} bytes where {self._nbytes} were announced: did the file change?")
        if self._sha256 and self._hash.hexdigest() != self._sha256:
            raise CorruptBlob(f"the body does not have the sha256 {self._sha256}: did the file change?")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False
