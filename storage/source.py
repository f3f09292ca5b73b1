"""What a directory holds, by hash: the first half of publishing it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.errors import InvalidName, InvalidSource
from storage.manifest import FileEntry, check_files


def scan(directory: Path) -> tuple[FileEntry, ...]:
    """An entry for every file below `directory`, by path.

    Raises:
        InvalidSource: not a directory, nothing in it, a link or special file, or something that cannot be read.
    """
    if not directory.is_dir():
        raise InvalidSource(f"{directory}: no such directory")
    paths = sorted(_walk(directory, directory))
    with ThreadPoolExecutor(4) as pool:
        try:
            files = tuple(pool.map(lambda path: _entry(directory, path), paths))
            check_files(files)
        except OSError as error:
            raise InvalidSource(f"{error.filename}: {error.strerror}") from error
        except InvalidName as error:
            raise InvalidSource(f"{directory}: {error}") from error
    return files


def _walk(root: Path, folder: Path) -> Iterator[str]:
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InvalidSource(f"{folder}: {error.strerror}") from error
    for entry in found:
        path = Path(entry.path)
        if entry.is_symlink():
            raise InvalidSource(f"{path} is a symbolic link; publish a directory of plain files (cp -rL makes one)")
        if entry.is_dir():
            yield from _walk(root, path)
        elif entry.is_file():
            yield path.relative_to(root).as_posix()
        else:
            raise InvalidSource(f"{path} is neither a file nor a directory")


def _entry(root: Path, path: str) -> FileEntry:
    handle = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as file:
        assert stat.S_ISREG(os.fstat(handle).st_mode), "checked by the walk"
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(path=path, sha256=digest, nbytes=file.tell())
