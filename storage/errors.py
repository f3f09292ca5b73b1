"""Every error of this package.

StorageError
  + InvalidName        400  a variant name, version, alias, key or repository URI that does not parse
  + InvalidSource      422  a directory that cannot be published: links, special or unreadable files, nothing in it
  + NotFound           404  no such key, variant, version or alias
  + Conflict           409  an alias still points to the version that was to be removed
  + CorruptBlob        502  bytes do not have the hash that their key or manifest promises
  + StoreUnavailable   503  the object store does not answer (retry_after_s)
  + CacheFull          507  the files do not fit the disk cache's budget, or the disk
"""

from __future__ import annotations


class StorageError(Exception):
    """Root of the tree."""

    status = 500
    code = "storage_error"
    retry_after_s: float | None = None


class InvalidName(StorageError, ValueError):
    status = 400
    code = "invalid_name"


class InvalidSource(StorageError, ValueError):
    status = 422
    code = "invalid_source"


class NotFound(StorageError, LookupError):
    status = 404
    code = "model_not_found"


class Conflict(StorageError):
    status = 409
    code = "conflict"


class CorruptBlob(StorageError):
    status = 502
    code = "delta_corrupt"


class StoreUnavailable(StorageError):
    status = 503
    code = "delta_unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CacheFull(StorageError):
    """`retry_after_s` is set when other files hold the room now, None when even all of it is not enough."""

    status = 507
    code = "cache_full"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
