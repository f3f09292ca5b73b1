"""The seam under everything in this package: a store of named blobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Protocol


class BlobStore(Protocol):
    """Keys are `/`-separated, relative, without `.` or `..` parts. All methods block and are safe to call from threads.

    Raises NotFound, StoreUnavailable; never a boto3 or OS error.
    """

    uri: str
    """How a user would name this store: `s3://bucket/prefix`, `file:///dir`, `memory://name`."""

    def size(self, key: str) -> int:
        """Bytes of the blob; NotFound when there is none."""
        ...

    def read(self, key: str) -> bytes:
        """The whole of a small blob."""
        ...

    def read_range(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start..stop (exclusive) in chunks."""
        ...

    def put(self, key: str, body: BinaryIO, nbytes: int) -> None:
        """Store, replacing what was there. All or nothing: no reader ever sees half a blob."""
        ...

    def put_new(self, key: str, body: bytes) -> bool:
        """Create a small blob; False when the key already exists (or somebody else won the race)."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys under the prefix, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove; a missing key is not an error."""
        ...
