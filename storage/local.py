"""A store in a directory: the default repository, and one on a shared file system.

Every blob is written to `.tmp/`, synced, and only then given its name: by `rename` (put) or by a hard link, which fails
when the name is taken (put_new). Needs a file system with hard links.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.base import CHUNK, Body, CheckedReader, check_key, check_prefix
from storage.errors import CorruptBlob, InvalidName, NotFound, StoreUnavailable

_ABANDONED_S = 24 * 3600
"""A temporary file this old belongs to a writer that died."""


class LocalStore:
    """Blobs as files under `root`, which is created by the first put."""

    settle_s = 0.0

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Raises InvalidName where something lies there that is no directory."""
        self.root = Path(root).expanduser().absolute()
        if self.root.exists() and not self.root.is_dir():
            raise InvalidName(f"{self.root} is no directory, as a repository is")
        self.uri = self.root.as_uri()
        self._swept = False
        self._sweeping = threading.Lock()

    def size(self, key: str) -> int:
        return self._stat(key).st_size

    def modified(self, key: str) -> float:
        return self._stat(key).st_mtime

    def read(self, key: str) -> bytes:
        with _reading(self.uri, key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        with _reading(self.uri, key), self._path(key).open("rb") as file:
            file.seek(start)
            while start < stop:
                data = file.read(min(CHUNK, stop - start))
                if not data:
                    raise CorruptBlob(f"{self._path(key)} ends at byte {start}, {stop} were asked for")
                start += len(data)
                yield data

    def put(self, key: str, body: Body, nbytes: int) -> None:
        target = self._path(key)
        with _writing(self.uri, key), self._written(CheckedReader(body, nbytes)) as temporary:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)
            sync_directory(target.parent)

    def put_new(self, key: str, body: bytes) -> bool:
        target = self._path(key)
        with _writing(self.uri, key), self._written(body) as temporary:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            sync_directory(target.parent)
            return True

    def touch(self, key: str) -> bool:
        with suppress(NotFound), _reading(self.uri, key):
            self._stat(key)
            os.utime(self._path(key))
            return True
        return False

    def list(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        folder = self.root / prefix.rpartition("/")[0]
        with _reading(self.uri, prefix):
            keys = sorted(str(file.relative_to(self.root)) for file in self._files(folder))
        yield from (key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with suppress(NotFound), _reading(self.uri, key):
            self._stat(key)
            self._path(key).unlink()

    def _files(self, folder: Path) -> Iterator[Path]:
        for parent, folders, files in os.walk(folder, onerror=_unless_missing):
            if Path(parent) == self.root and ".tmp" in folders:
                folders.remove(".tmp")
            yield from (Path(parent, name) for name in files)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _stat(self, key: str) -> os.stat_result:
        with _reading(self.uri, key):
            path = self._path(key)
            if path.is_dir():
                raise NotFound(f"{self.uri} has no blob {key!r}")
            return path.stat()

    @contextmanager
    def _written(self, body: bytes | CheckedReader) -> Iterator[Path]:
        """A synced temporary file with this content, on the store's file system."""
        folder = self.root / ".tmp"
        folder.mkdir(parents=True, exist_ok=True)
        self._sweep(folder)
        temporary = folder / uuid.uuid4().hex
        try:
            with temporary.open("xb") as file:
                if isinstance(body, bytes):
                    file.write(body)
                else:
                    shutil.copyfileobj(body, file, CHUNK)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self, folder: Path) -> None:
        with self._sweeping:
            if self._swept:
                return
            self._swept = True
            for file in folder.iterdir():
                with suppress(FileNotFoundError):
                    if time.time() - file.stat().st_mtime > _ABANDONED_S:
                        file.unlink()


@contextmanager
def _reading(uri: str, key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(f"{uri} has no blob {key!r}") from None
    except OSError as error:
        raise StoreUnavailable(f"{uri}: {key}: {error.strerror or error}") from error


@contextmanager
def _writing(uri: str, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"{uri}: {key} cannot be written: {error.strerror or error}") from error


def _unless_missing(error: OSError) -> None:
    """A folder that is not there holds no keys; one that cannot be read is not the same thing."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
