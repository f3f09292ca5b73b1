"""From what a user writes to a store."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from storage.base import BlobStore, check_prefix
from storage.errors import InvalidName
from storage.local import LocalStore
from storage.memory import MemoryStore

_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_EXPECTED = "expected a path, file:///path, s3://bucket/prefix or memory://name"


def open_store(uri: str | os.PathLike[str]) -> BlobStore:
    """A store for a path, `file:///path`, `s3://bucket/prefix` or `memory://name` (one per name in this process).

    Nothing is contacted or created yet.

    Raises:
        InvalidName: anything else.
    """
    text = os.fspath(uri)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return _open_local(text)
    match scheme[1].lower():
        case "file":
            return _open_local(_file_path(text))
        case "memory":
            return _open_memory(text)
        case "s3":
            return _open_s3(text)
        case other:
            raise InvalidName(
                f"repository {text!r}: unknown scheme {other!r}; {_EXPECTED} (a path with ':' needs './')"
            )


def repository_uri(explicit: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """The repository to use: `explicit`, else $BITDELTA_REPO, else `$XDG_DATA_HOME/bitdelta/repo` (~/.local/share)."""
    if explicit or environ.get("BITDELTA_REPO"):
        return explicit or environ["BITDELTA_REPO"]
    data = environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(data) / "bitdelta" / "repo")


def _open_local(path: str) -> LocalStore:
    if not path:
        raise InvalidName(f"the repository is an empty string; {_EXPECTED}")
    return LocalStore(path)


def _file_path(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidName(f"repository {uri!r}: a file URI has three slashes and an absolute path, file:///dir")
    return unquote(parts.path)


def _open_memory(uri: str) -> MemoryStore:
    name = uri.partition("//")[2]
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise InvalidName(f"repository {uri!r}: expected memory://name")
    with _memory_lock:
        return _memory.setdefault(name, MemoryStore(name))


def _open_s3(uri: str) -> BlobStore:
    from storage.s3 import S3Store  # boto3 costs most of a second, and local repositories do not need it

    parts = urlsplit(uri)
    prefix = parts.path.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", parts.netloc) or parts.query or parts.fragment:
        raise InvalidName(f"repository {uri!r}: expected s3://bucket/prefix")
    return S3Store(parts.netloc, check_prefix(prefix))
