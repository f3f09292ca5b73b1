"""Names for deltas: numbered immutable manifests and movable aliases in a blob store.

    blobs/sha256/<hex>                                a file's bytes
    variants/<owner>/<name>/versions/000007.json      a manifest, or a tombstone once version 7 is removed
    variants/<owner>/<name>/versions/000007.removed   says so in listings
    variants/<owner>/<name>/aliases/stable.json       {"version": 7}, the only thing that is ever changed in place

A version becomes visible in one step, by the creation of its manifest after all its blobs: an interrupted push leaves
at most blobs that nothing refers to, which `gc` collects.
"""

from __future__ import annotations

import io
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.base import BlobStore, CheckedReader
from storage.errors import Conflict, CorruptBlob, InvalidName, InvalidSource, NotFound
from storage.manifest import FileEntry, Manifest, VariantName
from storage.source import scan

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from any thread but never from two at once."""
DEFAULT_ALIAS = "latest"
DEFAULT_GRACE_S = 24 * 3600.0
_TOMBSTONE = b'{"format_version": 1, "removed": true}'
_VERSION_KEY = re.compile(r"variants/([^/]+/[^/]+)/versions/(\d{6,9})\.(json|removed)")
_ALIAS_KEY = re.compile(r"variants/([^/]+/[^/]+)/aliases/([^/]+)\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantInfo:
    """One line of a listing."""

    owner: str
    name: str
    versions: tuple[int, ...]
    """Ascending; never empty."""
    aliases: Mapping[str, int]

    @property
    def path(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def default_version(self) -> int:
        """What the bare name means."""
        return self.aliases.get(DEFAULT_ALIAS, self.versions[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class GcReport:
    """What a garbage collection did."""

    deleted: int
    nbytes: int
    kept_young: int
    """Blobs that nothing refers to yet, but younger than the grace period."""


class Catalog:
    """Publish, resolve, list, alias, remove. Keeps no state; safe to call from threads and processes."""

    def __init__(self, store: BlobStore, *, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self._clock = clock

    def publish(
        self,
        directory: Path,
        name: str,
        *,
        base_sha256: str,
        base_model: str = "",
        metadata: Mapping[str, Any] | None = None,
        expected_sha256: Mapping[str, str] | None = None,
        on_progress: Progress | None = None,
    ) -> Manifest:
        """Upload a directory as the next version of `owner/name`. Blobs that the store has are not sent again.

        `expected_sha256` (path -> hash) are hashes that files are known to have had when they were made.

        Raises:
            InvalidName: the name carries a version or alias, or base_sha256 is not one.
            InvalidSource: the directory has links, unreadable files, or nothing.
            CorruptBlob: a file changed while it was read, or does not have its expected hash.
            StoreUnavailable: the same call can be made again (at worst there are then two equal versions).
        """
        target = _bare(name)
        files = scan(directory)
        for entry in files:
            if (expected_sha256 or {}).get(entry.path, entry.sha256) != entry.sha256:
                raise CorruptBlob(
                    f"{directory / entry.path} has changed since it was made: its sha256 is {entry.sha256}"
                )
        draft = Manifest(
            owner=target.owner,
            name=target.name,
            version=1,
            files=files,
            base_sha256=base_sha256,
            base_model=base_model,
            created_at=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds"),
            metadata=dict(metadata or {}),
            publish_id=uuid.uuid4().hex,
        )
        Manifest.from_json(draft.to_json(), key=f"the manifest of {name}")  # nothing is published that cannot be read
        self._upload(directory, files, on_progress)
        manifest = self._create(target, draft)
        # A collection that read the manifests before this one was there may have taken blobs that we found present.
        for entry in files:
            if not self._has(entry):
                self._send(directory, entry, lambda nbytes: None)
        return manifest

    def resolve(self, name: str | VariantName) -> Manifest:
        """`owner/name@7`, `owner/name:alias`, or `owner/name`: the alias `latest` if set, else the highest version.

        Raises:
            InvalidName, NotFound, CorruptBlob, StoreUnavailable.
        """
        wanted = VariantName.parse(name) if isinstance(name, str) else name
        if wanted.version:
            return self._read(wanted, wanted.version)
        if wanted.alias:
            return self._read_alias(wanted, wanted.alias)
        keys = list(self.store.list(f"variants/{wanted.path}/"))
        if _alias_key(wanted, DEFAULT_ALIAS) in keys:
            return self._read_alias(wanted, DEFAULT_ALIAS)
        for version in reversed(_live_versions(keys)):
            try:
                return self._read(wanted, version)
            except NotFound:
                continue  # removed since the listing
        raise NotFound(f"no variant {wanted.path} in {self.store.uri}")

    def list(self) -> list[VariantInfo]:
        """Every variant that has a version, by name."""
        keys: dict[str, list[str]] = {}
        for key in self.store.list("variants/"):
            if match := _VERSION_KEY.fullmatch(key) or _ALIAS_KEY.fullmatch(key):
                keys.setdefault(match[1], []).append(key)
        aliases = self._aliases([key for group in keys.values() for key in group if _ALIAS_KEY.fullmatch(key)])
        found = []
        for path, group in sorted(keys.items()):
            if versions := tuple(_live_versions(group)):
                owner, _, name = path.partition("/")
                mine = {alias: v for alias, v in aliases.get(path, {}).items() if v in versions}
                found.append(VariantInfo(owner=owner, name=name, versions=versions, aliases=mine))
        return found

    def set_alias(self, name: str, alias: str) -> None:
        """Make `alias` mean `owner/name@7`; the last caller wins.

        Raises:
            InvalidName: no version in the name, or no alias in `alias`.
            NotFound: no such version.
        """
        wanted = VariantName.parse(name)
        if wanted.version is None:
            raise InvalidName(f"{name!r}: an alias points to a version, owner/name@VERSION")
        if VariantName.parse(f"{wanted.path}:{alias}").alias != alias:
            raise InvalidName(f"{alias!r} is not an alias")
        self._read(wanted, wanted.version)
        body = json.dumps({"version": wanted.version}).encode()
        self.store.put(_alias_key(wanted, alias), io.BytesIO(body), len(body))

    def remove(self, name: str) -> list[str]:
        """Remove a version (`owner/name@7`), an alias (`owner/name:alias`) or all of `owner/name`; what was removed.

        Version numbers are not given out again. Blobs stay until `gc`.

        Raises:
            NotFound: no such thing.
            Conflict: an alias points to the version.
        """
        wanted = VariantName.parse(name)
        if wanted.alias:
            key = _alias_key(wanted, wanted.alias)
            try:
                self.store.size(key)
            except NotFound:
                raise NotFound(f"no alias {wanted} in {self.store.uri}") from None
            self.store.delete(key)
            return [str(wanted)]
        keys = list(self.store.list(f"variants/{wanted.path}/"))
        alias_keys = [key for key in keys if _ALIAS_KEY.fullmatch(key)]
        if wanted.version:
            self._read(wanted, wanted.version)
            self._refuse_aliased(wanted, alias_keys)
            self._bury(wanted, wanted.version)
            return [str(wanted)]
        versions = _live_versions(keys)
        if not versions:
            raise NotFound(f"no variant {wanted.path} in {self.store.uri}")
        for key in alias_keys:
            self.store.delete(key)
        for version in versions:
            self._bury(wanted, version)
        return [f"{wanted.path}@{version}" for version in versions]

    def gc(self, *, grace_s: float = DEFAULT_GRACE_S, dry_run: bool = False) -> GcReport:
        """Delete blobs that no manifest refers to and that were neither put nor touched for `grace_s` seconds.

        Safe beside pushes that take less than the grace period: a push touches each blob that it finds present.

        Raises:
            CorruptBlob: a manifest cannot be read, so that what it refers to is unknown; nothing was deleted.
        """
        candidates = list(self.store.list("blobs/sha256/"))  # before the manifests: later ones then count as well
        live = self._live_blobs()
        deleted = nbytes = young = 0
        for key in candidates:
            if key in live:
                continue
            size = self.store.size(key)
            if self._clock() - self.store.modified(key) < grace_s:
                young += 1
                continue
            if not dry_run:
                self.store.delete(key)
            deleted, nbytes = deleted + 1, nbytes + size
        return GcReport(deleted=deleted, nbytes=nbytes, kept_young=young)

    def _upload(self, directory: Path, files: tuple[FileEntry, ...], on_progress: Progress | None) -> None:
        total, done = sum(entry.nbytes for entry in files), 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if on_progress:
                on_progress(done, total)

        for entry in files:
            if self._has(entry) and self.store.touch(entry.key):
                advance(entry.nbytes)
            else:
                self._send(directory, entry, advance)

    def _has(self, entry: FileEntry) -> bool:
        try:
            return self.store.size(entry.key) == entry.nbytes
        except NotFound:
            return False

    def _send(self, directory: Path, entry: FileEntry, on_bytes: Callable[[int], None]) -> None:
        try:
            file = (directory / entry.path).open("rb")
        except OSError as error:
            raise InvalidSource(f"{directory / entry.path}: {error.strerror}: did it change?") from error
        with file:
            body = CheckedReader(file, entry.nbytes, sha256=entry.sha256, on_bytes=on_bytes)
            self.store.put(entry.key, body, entry.nbytes)

    def _create(self, name: VariantName, draft: Manifest) -> Manifest:
        lost = 0
        while True:
            numbers = [int(match[2]) for key in self._version_keys(name) if (match := _VERSION_KEY.fullmatch(key))]
            lost = max([lost, *numbers]) + 1  # beyond what a lagging listing shows
            manifest = replace(draft, version=lost)
            if self._claim(_version_key(name, lost), manifest.to_json()):
                return manifest

    def _claim(self, key: str, raw: bytes) -> bool:
        """Whether the manifest under this key is ours. The re-read decides, for two reasons: a request that was
        retried after it had succeeded reports a lost race, and some servers let two racing creations succeed."""
        if self.store.put_new(key, raw) and self.store.settle_s:
            time.sleep(self.store.settle_s)
        return self.store.read(key) == raw

    def _version_keys(self, name: VariantName) -> list[str]:
        return list(self.store.list(f"variants/{name.path}/versions/"))

    def _read(self, name: VariantName, version: int) -> Manifest:
        key, label = _version_key(name, version), f"{name.path}@{version}"
        try:
            raw = self.store.read(key)
        except NotFound:
            raise NotFound(f"no version {label} in {self.store.uri}") from None
        if raw == _TOMBSTONE:
            raise NotFound(f"version {label} was removed from {self.store.uri}")
        manifest = Manifest.from_json(raw, key=f"{self.store.uri}/{key}")
        if manifest.model_id != label:
            raise CorruptBlob(f"{self.store.uri}/{key} holds the manifest of {manifest.model_id}")
        return manifest

    def _read_alias(self, name: VariantName, alias: str) -> Manifest:
        try:
            version = self._alias_target(_alias_key(name, alias))
        except NotFound:
            raise NotFound(f"no alias {name.path}:{alias} in {self.store.uri}") from None
        return self._read(name, version)

    def _alias_target(self, key: str) -> int:
        raw = self.store.read(key)
        try:
            version = json.loads(raw)["version"]
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptBlob(f"{self.store.uri}/{key} is not an alias: {error}") from error
        if type(version) is not int or version < 1:
            raise CorruptBlob(f"{self.store.uri}/{key} is not an alias: version {version!r}")
        return version

    def _aliases(self, keys: list[str]) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        with ThreadPoolExecutor(8) as pool:
            for key, version in zip(keys, pool.map(self._alias_target_or_none, keys), strict=True):
                match = _ALIAS_KEY.fullmatch(key)
                assert match
                if version is not None:
                    found.setdefault(match[1], {})[match[2]] = version
        return found

    def _alias_target_or_none(self, key: str) -> int | None:
        try:
            return self._alias_target(key)
        except NotFound:
            return None  # removed since the listing

    def _refuse_aliased(self, name: VariantName, alias_keys: list[str]) -> None:
        pointing = [
            match[2]
            for key in alias_keys
            if (match := _ALIAS_KEY.fullmatch(key)) and self._alias_target_or_none(key) == name.version
        ]
        if pointing:
            raise Conflict(f"{name}: alias {', '.join(pointing)} points to it; move or remove the alias first")

    def _bury(self, name: VariantName, version: int) -> None:
        """In place of the manifest stands a tombstone, so that the number stays taken; the marker is for listings."""
        self.store.put(_version_key(name, version), io.BytesIO(_TOMBSTONE), len(_TOMBSTONE))
        self.store.put_new(_version_key(name, version).removesuffix("json") + "removed", b"")

    def _live_blobs(self) -> set[str]:
        keys = [key for key in self.store.list("variants/") if (m := _VERSION_KEY.fullmatch(key)) and m[3] == "json"]
        with ThreadPoolExecutor(8) as pool:
            return {entry.key for files in pool.map(self._files_of, keys) for entry in files}

    def _files_of(self, key: str) -> tuple[FileEntry, ...]:
        raw = self.store.read(key)
        return () if raw == _TOMBSTONE else Manifest.from_json(raw, key=f"{self.store.uri}/{key}").files


def _bare(name: str) -> VariantName:
    parsed = VariantName.parse(name)
    if parsed.version or parsed.alias:
        raise InvalidName(f"{name!r}: versions are numbered by the repository; push to {parsed.path!r}")
    return parsed


def _version_key(name: VariantName, version: int) -> str:
    return f"variants/{name.path}/versions/{version:06d}.json"


def _alias_key(name: VariantName, alias: str) -> str:
    return f"variants/{name.path}/aliases/{alias}.json"


def _live_versions(keys: list[str]) -> list[int]:
    found: dict[str, set[int]] = {"json": set(), "removed": set()}
    for key in keys:
        if match := _VERSION_KEY.fullmatch(key):
            found[match[3]].add(int(match[2]))
    return sorted(found["json"] - found["removed"])
