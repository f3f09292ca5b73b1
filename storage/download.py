"""A published version as a plain directory of the user's own, outside any cache."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from storage.base import BlobStore
from storage.errors import CorruptBlob, InvalidSource
from storage.fetch import fetch_blob
from storage.manifest import Manifest


def download(
    store: BlobStore, manifest: Manifest, directory: Path, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Create `directory` with the version's files, verified. It appears whole or not at all.

    Raises:
        InvalidSource: the directory exists and is not empty, or cannot be written.
        CorruptBlob, NotFound, StoreUnavailable: from the store.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidSource(f"{directory} exists and is not an empty directory; name a new one")
    temporary = directory.absolute().parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    counter = Counter(manifest.nbytes, on_progress)
    try:
        for entry in manifest.files:
            file = temporary / entry.path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb+") as handle:
                digest = fetch_blob(store, entry.key, entry.nbytes, handle.fileno(), on_bytes=counter.add)
            if digest != entry.sha256:
                raise CorruptBlob(f"{store.uri}/{entry.key} ({entry.path}) has sha256 {digest}")
        temporary.rename(directory)  # an empty directory of that name is replaced
    except OSError as error:
        raise InvalidSource(f"{directory} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Counter:
    """Adds up bytes from many threads for a callback that wants (done, total), in order."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._total, self._done = total, 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._report(min(self._done + nbytes, self._total))

    def finish(self) -> None:
        """What was cached, or fetched by another thread, was never counted."""
        with self._lock:
            self._report(self._total)

    def _report(self, done: int) -> None:
        self._done = done
        if self._on_progress:
            self._on_progress(done, self._total)
