"""A published version of a variant: which files it consists of, by hash. Immutable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.errors import InvalidName

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NAME = re.compile(
    rf"(?P<owner>{_PART.pattern})/(?P<name>{_PART.pattern})(?:@(?P<version>[1-9]\d{{0,8}})|:(?P<alias>{_PART.pattern}))?"
)


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
    """One file of a delta directory, stored as blob `blobs/sha256/<sha256>`."""

    path: str
    sha256: str
    nbytes: int


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
            "format_version": 1,
            "owner": self.owner,
            "name": self.name,
            "version": self.version,
            "base_sha256": self.base_sha256,
            "base_model": self.base_model,
            "created_at": self.created_at,
            "metadata": dict(self.metadata),
            "files": [{"path": e.path, "sha256": e.sha256, "nbytes": e.nbytes} for e in self.files],
        }
        return json.dumps(body, indent=2, sort_keys=True).encode()
