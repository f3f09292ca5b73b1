"""Moves bytes and knows hashes: blob stores, a catalog of published deltas, a disk cache. No torch.

Reading order: errors, base (the seam), memory, local, s3, uri; manifest, source, catalog; fetch, download,
cache_dir, cache; lookups, repository. `storage.s3` is imported only when it is used.
"""

from storage.base import BlobStore
from storage.cache import CacheStats, DiskCache
from storage.cache_dir import Lease
from storage.catalog import Catalog, GcReport, VariantInfo
from storage.download import download
from storage.errors import (
    CacheFull,
    Conflict,
    CorruptBlob,
    InvalidName,
    InvalidSource,
    NotFound,
    StorageError,
    StoreUnavailable,
)
from storage.local import LocalStore
from storage.manifest import FileEntry, Manifest, VariantName
from storage.memory import MemoryStore
from storage.repository import Repository
from storage.uri import open_store, repository_uri

__all__ = [
    "BlobStore",
    "CacheFull",
    "CacheStats",
    "Catalog",
    "Conflict",
    "CorruptBlob",
    "DiskCache",
    "FileEntry",
    "GcReport",
    "InvalidName",
    "InvalidSource",
    "Lease",
    "LocalStore",
    "Manifest",
    "MemoryStore",
    "NotFound",
    "Repository",
    "StorageError",
    "StoreUnavailable",
    "VariantInfo",
    "VariantName",
    "download",
    "open_store",
    "repository_uri",
]
