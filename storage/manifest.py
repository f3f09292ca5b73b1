"""A published version of a variant: which files it consists of, by hash. Immutable.

The JSON form is specified in docs/storage.md. Not covered: what the files contain.
That is for bitdelta_core.delta to say.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.errors import CorruptBlob, InvalidName

FORMAT_VERSION = 1
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NAME = re.compile(
    rf"(?P<owner>{_PART.pattern})/(?P<name>{_PART.pattern})(?:@(?P<version>[1-9]\d{{0,8}})|:(?P<alias>{_PART.pattern}))?",
    re.ASCII,
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:]")
_MAX_FILES = 10_000
_MAX_NBYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class VariantName:
    """`owner/name`, `owner/name@7` (a version) or `owner/name:stable` (an alias)."""

    owner: str
    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> VariantName:
        """Raises InvalidName with what was expected."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise InvalidName(
                f"{text!r} is not a variant name: expected owner/name, owner/name@VERSION or owner/name:ALIAS"
            )
        version = match["version"]
        return cls(match["owner"], match["name"], int(version) if version else None, match["alias"])

    @property
    def path(self) -> str:
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        suffix = f"@{self.version}" if self.version else f":{self.alias}" if self.alias else ""
        return self.path + suffix


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a delta directory, stored as blob `blobs/sha256/<sha256>`.

    Raises:
        InvalidName: the path is not a plain relative one, or the hash or size is not one.
    """

    path: str
    sha256: str
    nbytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not _is_safe(self.path):
            raise InvalidName(f"{self.path!r} is not a relative file path without '.', '..', '\\' or ':'")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise InvalidName(f"{self.path}: {self.sha256!r} is not a sha256 of 64 lower-case hex digits")
        if type(self.nbytes) is not int or not 0 <= self.nbytes <= _MAX_NBYTES:
            raise InvalidName(f"{self.path}: {self.nbytes!r} is not a number of bytes")

    @property
    def key(self) -> str:
        """Where the bytes are in a store."""
        return f"blobs/sha256/{self.sha256}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """`variants/<owner>/<name>/versions/<version, 6 digits>.json`."""

    owner: str
    name: str
    version: int
    files: tuple[FileEntry, ...]
    base_sha256: str
    base_model: str = ""
    created_at: str = ""
    """ISO 8601, UTC."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    publish_id: str = ""
    """Random; tells two pushes of equal content apart, so that each knows whether its own write won."""

    @property
    def model_id(self) -> str:
        """`owner/name@version`."""
        return f"{self.owner}/{self.name}@{self.version}"

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.files)

    @property
    def delta_sha256(self) -> str:
        """Identity of the content: equal for equal files, whatever name or version they are published under."""
        lines = [f"{e.sha256} {e.nbytes} {e.path}" for e in sorted(self.files, key=lambda e: e.path)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_json(self) -> bytes:
        body = {
            "format_version": FORMAT_VERSION,
            "owner": self.owner,
            "name": self.name,
            "version": self.version,
            "base_sha256": self.base_sha256,
            "base_model": self.base_model,
            "created_at": self.created_at,
            "metadata": dict(self.metadata),
            "publish_id": self.publish_id,
            "files": [{"path": e.path, "sha256": e.sha256, "nbytes": e.nbytes} for e in self.files],
        }
        return json.dumps(body, indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes, *, key: str) -> Manifest:
        """Parse strictly; `key` is where the bytes came from.

        Raises:
            CorruptBlob: anything but a well-formed manifest of this format version, naming the key and the field.
        """
        try:
            return _parse(raw)
        except (ValueError, RecursionError) as error:
            raise CorruptBlob(f"{key} is not a manifest: {error}") from error


def check_files(files: tuple[FileEntry, ...]) -> None:
    """Raise InvalidName unless the entries can stand together in one directory."""
    if not 0 < len(files) <= _MAX_FILES:
        raise InvalidName(f"a delta has 1 to {_MAX_FILES} files, not {len(files)}")
    paths = {entry.path for entry in files}
    folders = {"/".join(path.split("/")[:i]) for path in paths for i in range(1, path.count("/") + 1)}
    if len(paths) < len(files) or paths & folders:
        raise InvalidName("two files have one path, or a file's path is another's folder")


def _is_safe(path: str) -> bool:
    parts = path.split("/")
    return len(path.encode(errors="replace")) <= 1024 and not (
        _UNSAFE.search(path)
        or any(part in ("", ".", "..") or len(part.encode(errors="replace")) > 255 for part in parts)
    )


def _parse(raw: bytes) -> Manifest:
    body = json.loads(raw)
    if not isinstance(body, dict):
        raise ValueError("the top level is not an object")
    version = _field(body, "format_version", int)
    if version > FORMAT_VERSION:
        raise ValueError(f"format_version {version} was written by a newer bitdelta; this one reads {FORMAT_VERSION}")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version {version} is unknown")
    owner, name, number = _field(body, "owner", str), _field(body, "name", str), _field(body, "version", int)
    if VariantName.parse(f"{owner}/{name}@{number}") != VariantName(owner, name, number):
        raise ValueError("owner, name and version do not form a name")
    base_sha256 = _field(body, "base_sha256", str)
    if not _SHA256.fullmatch(base_sha256):
        raise ValueError(f"base_sha256 {base_sha256!r} is not 64 lower-case hex digits")
    files = tuple(_parse_file(entry) for entry in _field(body, "files", list))
    check_files(files)
    return Manifest(
        owner=owner,
        name=name,
        version=number,
        files=files,
        base_sha256=base_sha256,
        base_model=_field(body, "base_model", str),
        created_at=_field(body, "created_at", str),
        metadata=_field(body, "metadata", dict),
        publish_id=_field(body, "publish_id", str),
    )


def _parse_file(entry: object) -> FileEntry:
    if not isinstance(entry, dict):
        raise ValueError("an entry of 'files' is not an object")
    return FileEntry(
        path=_field(entry, "path", str), sha256=_field(entry, "sha256", str), nbytes=_field(entry, "nbytes", int)
    )


def _field(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name!r} is {'missing' if name not in body else f'not of type {kind.__name__}'}")
    return value
