"""A store and a disk cache together: names to manifests, manifests to directories."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from storage.base import BlobStore
from storage.cache import DiskCache
from storage.cache_dir import Lease
from storage.catalog import Catalog, Progress, VariantInfo
from storage.download import Counter
from storage.errors import CorruptBlob
from storage.fetch import fetch_blob
from storage.lookups import Lookups
from storage.manifest import FileEntry, Manifest, VariantName


class Repository:
    """What a server needs of storage. Every method blocks; all are safe to call from threads.

    While the store is unavailable, names that were resolved in the last `max_stale_s` keep resolving and deltas in the
    cache keep being served; the rest raises StoreUnavailable at once (retry_after_s), without waiting for the network.
    """

    def __init__(
        self,
        store: BlobStore,
        cache: DiskCache,
        *,
        ttl_s: float = 2.0,
        missing_ttl_s: float = 0.5,
        max_stale_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A pushed version or moved alias is seen within `ttl_s`, a name that did not exist within `missing_ttl_s`."""
        self.store = store
        self.cache = cache
        self.catalog = Catalog(store)
        self._lookups = Lookups(store.uri, ttl_s, missing_ttl_s, max_stale_s, clock)

    def resolve(self, name: str) -> Manifest:
        """The manifest that `owner/name`, `owner/name@7` or `owner/name:alias` means now.

        Raises:
            InvalidName, NotFound, CorruptBlob, StoreUnavailable.
        """
        wanted = VariantName.parse(name)
        return self._lookups.get(str(wanted), lambda: self.catalog.resolve(wanted))

    def list_variants(self) -> list[VariantInfo]:
        """Every variant, by name; as old as `resolve` may be."""
        return self._lookups.get("", self.catalog.list)

    def read(self, entry: FileEntry) -> bytes:
        """The whole of a small file, past the cache.

        Raises:
            CorruptBlob: the store has other bytes. NotFound, StoreUnavailable.
        """
        body = self.store.read(entry.key)
        if hashlib.sha256(body).hexdigest() != entry.sha256:
            raise CorruptBlob(f"{entry.key} in {self.store.uri} is not what its name says")
        return body

    def lease(self, manifest: Manifest, on_progress: Progress | None = None) -> Lease:
        """The delta's directory, downloaded if needed, kept on disk until the lease is released: `with ... as path`.

        Raises:
            CacheFull, CorruptBlob, StoreUnavailable; NotFound when a blob is missing from the store.
        """
        counter = Counter(manifest.nbytes, on_progress)

        def fetch(entry: FileEntry, fd: int, stop: threading.Event) -> str:
            return fetch_blob(self.store, entry.key, entry.nbytes, fd, stop=stop, on_bytes=counter.add)

        lease = self.cache.lease(manifest, fetch)
        counter.finish()
        return lease

    def fetch(self, manifest: Manifest, on_progress: Progress | None = None) -> Path:
        """The same without a lease: open the files soon, a later fetch may evict the directory."""
        with self.lease(manifest, on_progress) as path:
            return path
