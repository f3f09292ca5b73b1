"""A store in an S3 bucket, through boto3. Known servers and settings: docs/storage.md.

Holds on AWS and on every other server tried: blobs are content-addressed, so uploading needs no condition; the only
conditional request is a small single-part `PUT` with `If-None-Match: *`; an ETag is never taken for a hash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError, PartialCredentialsError

from storage.base import CHUNK, Body, CheckedReader, check_key, check_prefix
from storage.errors import CorruptBlob, InvalidName, NotFound, StorageError, StoreUnavailable

_MISSING = {"404", "NoSuchKey", "NotFound"}
_LOST_RACE = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict", "Conflict"}
_REFUSED = {
    "401", "403", "AccessDenied", "ExpiredToken", "Forbidden", "InvalidAccessKeyId", "InvalidToken",
    "SignatureDoesNotMatch", "Unauthorized",
}  # fmt: skip
_RACE_S = 0.5
"""On servers that check `If-None-Match` and then write (Swift), how far apart two winners may be."""
# "crt" would ignore the client's endpoint and settings and go to AWS; "auto" picks it on some machines.
_TRANSFER = TransferConfig(
    preferred_transfer_client="classic",
    multipart_threshold=16 << 20,
    multipart_chunksize=16 << 20,
    max_concurrency=8,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Config:
    """What is not said here is left to boto3: the shared config files, the credential chain, the AWS_* variables."""

    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: str | None = None
    """`path`, `virtual` or `auto`. None: path for an own endpoint, virtual for AWS."""
    checksums: str | None = None
    """`when_supported` (boto3's default: CRC32 trailers) or `when_required` (for servers that refuse those)."""
    timeout_s: float = 30.0
    """Without a byte from the server."""
    max_attempts: int = 4

    def __post_init__(self) -> None:
        if self.addressing_style not in (None, "path", "virtual", "auto"):
            raise InvalidName(f"S3 addressing style {self.addressing_style!r}: expected path, virtual or auto")
        if self.checksums not in (None, "when_supported", "when_required"):
            raise InvalidName(f"S3 checksum mode {self.checksums!r}: expected when_supported or when_required")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> S3Config:
        """AWS_ENDPOINT_URL[_S3], AWS_REGION and AWS_DEFAULT_REGION, and BITDELTA_S3_ADDRESSING_STYLE.

        AWS_REQUEST_CHECKSUM_CALCULATION and the credentials are read by boto3 itself.
        """
        return cls(
            endpoint_url=environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL"),
            region=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION"),
            addressing_style=environ.get("BITDELTA_S3_ADDRESSING_STYLE"),
        )

    def client(self, session: boto3.Session) -> Any:
        """A client of the classic kind; thread-safe."""
        region = self.region or session.region_name or ("us-east-1" if self.endpoint_url else None)
        return session.client("s3", endpoint_url=self.endpoint_url, region_name=region, config=self._botocore())

    def _botocore(self) -> Config:
        options: dict[str, Any] = {
            "connect_timeout": 5,
            "read_timeout": self.timeout_s,
            # Not "adaptive": its client-side rate limit holds up every thread after one throttled call.
            "retries": {"mode": "standard", "total_max_attempts": self.max_attempts},
            "max_pool_connections": 64,
        }
        if self.addressing_style:
            options["s3"] = {"addressing_style": self.addressing_style}
        if self.checksums:
            options |= {"request_checksum_calculation": self.checksums, "response_checksum_validation": self.checksums}
        return Config(**options)


class S3Store:
    """Blobs as objects `prefix/key` of one bucket. Building it contacts nobody."""

    def __init__(
        self, bucket: str, prefix: str = "", *, config: S3Config | None = None, session: boto3.Session | None = None
    ) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        with self._errors(""):
            self._client = (config or S3Config.from_env()).client(session or boto3.Session())
        self.settle_s = 0.0 if ".amazonaws.com" in self._client.meta.endpoint_url else _RACE_S

    def size(self, key: str) -> int:
        return self._head(key)["ContentLength"]

    def modified(self, key: str) -> float:
        return self._head(key)["LastModified"].timestamp()

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return self._client.get_object(**self._at(key))["Body"].read()

    def read_range(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        if start >= stop:
            return
        with self._errors(key):
            answer = self._client.get_object(**self._at(key), Range=f"bytes={start}-{stop - 1}")
            with closing(answer["Body"]) as body:
                self._check_range(key, answer, start, stop)
                yield from body.iter_chunks(CHUNK)

    def put(self, key: str, body: Body, nbytes: int) -> None:
        with self._errors(key):
            self._client.upload_fileobj(CheckedReader(body, nbytes), self._bucket, self._name(key), Config=_TRANSFER)

    def put_new(self, key: str, body: bytes) -> bool:
        with self._errors(key):
            try:
                self._client.put_object(**self._at(key), Body=body, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) in _LOST_RACE:
                    return False
                raise
            return True

    def touch(self, key: str) -> bool:
        place = self._at(key)
        with self._errors(key):
            try:
                self._client.copy(place, **place, ExtraArgs={"MetadataDirective": "REPLACE"}, Config=_TRANSFER)
            except ClientError as error:
                if _code(error) in _MISSING:
                    return False
                raise
            return True

    def list(self, prefix: str) -> Iterator[str]:
        start = self._prefix + check_prefix(prefix)
        with self._errors(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start):
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/"):  # what consoles leave behind as a "folder"
                        yield entry["Key"].removeprefix(self._prefix)

    def delete(self, key: str) -> None:
        with self._errors(key):
            try:
                self._client.delete_object(**self._at(key))
            except ClientError as error:
                if _code(error) not in _MISSING:
                    raise

    def _check_range(self, key: str, answer: Mapping[str, Any], start: int, stop: int) -> None:
        """Some servers answer a range with the whole object, and all cut a range short at the object's end."""
        length, place = answer["ContentLength"], answer.get("ContentRange", "")
        if place.startswith(f"bytes {start}-") and length < stop - start:
            raise CorruptBlob(f"{self.uri}/{key} ends at byte {start + length}, {stop} were asked for")
        if length != stop - start or not (start == 0 or place.startswith(f"bytes {start}-")):
            raise StoreUnavailable(
                f"{self.uri}: the server ignores range requests (asked {start}-{stop}, got {place!r})"
            )

    def _head(self, key: str) -> dict[str, Any]:
        with self._errors(key):
            return self._client.head_object(**self._at(key))

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._name(key)}

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except ClientError as error:
            raise self._named(error, key) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreUnavailable(
                f"{self.uri}: no AWS credentials found (environment, profile, role): {error}"
            ) from error
        except (BotoCoreError, HTTPClientError, OSError, ValueError) as error:
            raise StoreUnavailable(f"{self.uri}: {key}: {error}") from error

    def _named(self, error: ClientError, key: str) -> StorageError:
        code, message = _code(error), error.response.get("Error", {}).get("Message", "")
        if code in _MISSING:
            return NotFound(f"{self.uri} has no blob {key!r}")
        if code in ("416", "InvalidRange", "RequestedRangeNotSatisfiable"):
            return CorruptBlob(f"{self.uri}/{key} is shorter than the range asked for")
        if code == "NoSuchBucket":
            return StoreUnavailable(f"{self.uri}: bucket {self._bucket!r} does not exist (or not at this endpoint)")
        if code in _REFUSED:
            advice = "check the credentials and their rights to get, put, list and delete"
            return StoreUnavailable(f"{self.uri}: access refused ({code} {message}): {advice}", retry_after_s=60.0)
        return StoreUnavailable(f"{self.uri}: {key}: {code} {message}".rstrip())


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
