"""Every error that a caller of bitdelta_core can meet.

BitDeltaError
  + InvalidRequest            400  a parameter is out of range or not supported (param names it)
      + ContextLengthExceeded 400  prompt (plus max_tokens) longer than the variant's context
  + CheckpointError           422  a base or fine-tune directory cannot be read as a Hugging Face checkpoint
  + DeltaError                422  something about one delta; `.delta` names it
      + DeltaFormatError      422  malformed, truncated or inconsistent file
          + UnsupportedFormat 422  written by a newer version, or an unknown codec
      + BaseMismatch          409  the delta belongs to another base
      + DeltaTooLarge         413  does not fit the slab even when it is empty
      + DeltaUnavailable      503  its bytes could not be fetched now (retry_after_s)
  + Overloaded                429  queue full (retry_after_s)
  + EngineDead                503  the engine loop has stopped

`status` is the HTTP status that the serving layer answers with, `code` the OpenAI-style string in the error body.
"""

from __future__ import annotations


class BitDeltaError(Exception):
    """Root of the tree."""

    status = 500
    code = "internal_error"
    retry_after_s: float | None = None


class InvalidRequest(BitDeltaError, ValueError):
    """The caller asked for something that is out of range or that this engine does not do."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit the variant's context window."""

    code = "context_length_exceeded"


class CheckpointError(BitDeltaError):
    """A checkpoint directory is missing files, or a tensor in it is not what its config says."""

    status = 422
    code = "invalid_checkpoint"


class DeltaError(BitDeltaError):
    """Root of what can be wrong with one delta."""

    status = 422
    code = "invalid_delta"

    def __init__(self, message: str, *, delta: str | None = None) -> None:
        super().__init__(message)
        self.delta = delta


class DeltaFormatError(DeltaError):
    """The delta's files are malformed, truncated or contradict each other."""

    code = "delta_corrupt"


class UnsupportedFormat(DeltaFormatError):
    """The delta was written by a newer version of the format, or with an unknown codec."""

    code = "delta_unsupported"


class BaseMismatch(DeltaError):
    """The delta was made from another base than the one at hand."""

    status = 409
    code = "base_mismatch"


class DeltaTooLarge(DeltaError):
    """The delta is larger than the whole slab."""

    status = 413
    code = "delta_too_large"


class DeltaUnavailable(DeltaError):
    """The delta's bytes cannot be had right now."""

    status = 503
    code = "delta_unavailable"

    def __init__(self, message: str, *, delta: str | None = None, retry_after_s: float = 5.0) -> None:
        super().__init__(message, delta=delta)
        self.retry_after_s = retry_after_s


class Overloaded(BitDeltaError):
    """The waiting queue is full."""

    status = 429
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDead(BitDeltaError):
    """The engine loop stopped; the process should be replaced."""

    status = 503
    code = "engine_dead"
