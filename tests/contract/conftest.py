"""The stores that the contract suite runs over."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from storage.base import BlobStore
from storage.local import LocalStore
from storage.memory import MemoryStore
from storage.s3 import S3Config, S3Store
from tests.contract.swift_server import SwiftServer, running

STORES = ["memory", "local", "moto", pytest.param("swift", marks=pytest.mark.s3)]


@functools.cache
def session(access_key: str, secret_key: str) -> boto3.Session:
    """One per pair of keys: making one takes long."""
    return boto3.Session(access_key, secret_key)


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    with running(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(scope="session")
def swift_bucket(swift: SwiftServer) -> str:
    swift_client(swift).create_bucket(Bucket="contract")
    return "contract"


@pytest.fixture(scope="session")
def moto_bucket() -> Iterator[str]:
    from moto import mock_aws

    with mock_aws():
        session("a", "b").client("s3", region_name="us-east-1").create_bucket(Bucket="contract")
        yield "contract"


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """A fresh, empty store of each kind."""
    return make_store(request.param, request.getfixturevalue, tmp_path)


def make_store(kind: str, fixture: Callable[[str], object], tmp_path: Path) -> BlobStore:
    match kind:
        case "memory":
            return MemoryStore()
        case "local":
            return LocalStore(tmp_path / "store")
        case "moto":
            fixture("moto_bucket")
            config = S3Config(region="us-east-1")
            return S3Store("contract", uuid.uuid4().hex, config=config, session=session("a", "b"))
        case _:
            fixture("swift_bucket")
            server = fixture("swift")
            assert isinstance(server, SwiftServer)
            return swift_store(server, uuid.uuid4().hex)


def swift_store(server: SwiftServer, prefix: str, *, secret_key: str | None = None) -> S3Store:
    keys = session(server.access_key, secret_key or server.secret_key)
    return S3Store("contract", prefix, config=S3Config(endpoint_url=server.endpoint_url), session=keys)


def swift_client(server: SwiftServer) -> Any:
    return S3Config(endpoint_url=server.endpoint_url).client(session(server.access_key, server.secret_key))
