"""From a model name to whose weights it means, for one caller. Remembering names is the repository's business."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from bitdelta_core.errors import BaseMismatch
from deployments.calls import ModelInfo, Target
from deployments.config import AppConfig
from deployments.errors import ModelNotFound
from storage import DiskCache, Manifest, NotFound, Repository, VariantInfo, VariantName, open_store, repository_uri
from storage.errors import InvalidName

LOOKUP_THREADS = 64
T = TypeVar("T")


class Names(Protocol):
    """What the catalog needs of a repository. Blocking."""

    def resolve(self, name: str) -> Manifest: ...

    def list_variants(self) -> Sequence[VariantInfo]: ...


def open_repository(config: AppConfig) -> Repository:
    """The repository and this node's disk cache of it."""
    store = open_store(repository_uri(config.repo))
    return Repository(store, DiskCache(config.cache_path, config.cache_bytes), ttl_s=config.catalog_ttl_s)


class Catalog:
    """Asks in threads of its own, so that lookups in a slow store delay nothing else."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._pool = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="catalog")

    async def target(self, model: str, info: ModelInfo, owners: frozenset[str] | None) -> Target:
        """Whose weights `model` means; empty is the base. `owners`: whose variants the caller may use (None: all).

        Raises:
            ModelNotFound: no such variant, or not the caller's.
            BaseMismatch: a variant of another base.
            StoreUnavailable: a name never seen before, and the store is down.
        """
        if model in ("", info.base_name):
            return Target(model=info.base_name)
        try:
            owner = VariantName.parse(model).owner
            if owners is not None and owner not in owners:
                raise ModelNotFound(model)
            manifest = await self._ask(self._names.resolve, model)
        except (InvalidName, NotFound):
            raise ModelNotFound(model) from None
        if manifest.base_sha256 != info.base_sha256:
            raise BaseMismatch(
                f"{manifest.model_id} is a variant of base {manifest.base_sha256[:12]}…, "
                f"this server has {info.base_sha256[:12]}… ({info.base_name})",
                delta=manifest.model_id,
            )
        return Target(model=model, manifest=manifest)

    async def variants(self, info: ModelInfo, owners: frozenset[str] | None) -> list[Manifest]:
        """What the bare name of each variant of this base means, by name; only those that the caller may use."""
        listed = await self._ask(self._names.list_variants)
        mine = [v for v in listed if owners is None or v.owner in owners]
        found = await asyncio.gather(*(self._manifest(f"{v.path}@{v.default_version}") for v in mine))
        return [m for m in found if m is not None and m.base_sha256 == info.base_sha256]

    async def _manifest(self, name: str) -> Manifest | None:
        """None: removed since the listing."""
        try:
            return await self._ask(self._names.resolve, name)
        except NotFound:
            return None

    async def _ask(self, question: Callable[..., T], *args: str) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, question, *args)
