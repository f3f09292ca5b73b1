"""Errors that only the serving layer knows, and how every error looks to an OpenAI client.

ServingLayerError is a BitDeltaError
  + Unauthorized   401  no or a wrong API key
  + ModelNotFound  404  no such variant, or not one of this key's (the same answer: names do not leak)
  + PayloadTooLarge 413 a body that is larger than the limit
  + ReplicaLost    503  the replica died while it worked on this request (retry_after_s)
"""

from __future__ import annotations

import copy
import math

from bitdelta_core.errors import BitDeltaError, CheckpointError, DeltaError, InvalidRequest
from deployments.calls import Target
from deployments.openai_responses import ErrorBody, ErrorDetail
from storage.errors import StorageError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


class ServingLayerError(BitDeltaError):
    """Root of this module's tree."""


class Unauthorized(ServingLayerError):
    status = 401
    code = "invalid_api_key"


class ModelNotFound(ServingLayerError):
    status = 404
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        return f"The model `{self.model[:200]}` does not exist."

    @property
    def param(self) -> str:
        return "model"


class PayloadTooLarge(ServingLayerError):
    status = 413
    code = "payload_too_large"


class ReplicaLost(ServingLayerError):
    status = 503
    code = "replica_lost"
    retry_after_s = 1.0


def http_error(status: int, code: str, message: str, param: str | None = None) -> ErrorBody:
    kind = _TYPES.get(status, "server_error")
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def named(error: BitDeltaError, target: Target) -> BitDeltaError:
    """The same for whoever asked for this target. The engine knows hashes only, and others who wait for the same
    bytes may know them by another name, so each is told in a copy."""
    if target.manifest is None or not isinstance(error, DeltaError | CheckpointError):
        return error
    name = target.manifest.model_id
    told = copy.copy(error)
    told.args = (f"{name}: {error}",)
    if isinstance(told, DeltaError):
        told.delta = name
    return told


def describe(error: Exception) -> tuple[int, ErrorBody, dict[str, str]]:
    """(status, body, headers). An error that nobody foresaw says nothing of our insides."""
    if not isinstance(error, BitDeltaError | StorageError):
        return 500, http_error(500, "internal_error", "Internal server error."), {}
    param = error.param if isinstance(error, InvalidRequest | ModelNotFound) else None
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return error.status, http_error(error.status, error.code, str(error), param), headers
