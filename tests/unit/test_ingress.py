"""What stands around the routes: bodies, errors, names, cards."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from starlette.requests import Request

from bitdelta_core.errors import BaseMismatch, ContextLengthExceeded, DeltaUnavailable, InvalidRequest, Overloaded
from deployments import cards
from deployments.calls import ModelInfo, Target
from deployments.catalog import Catalog
from deployments.errors import ModelNotFound, PayloadTooLarge, Unauthorized, describe, named
from deployments.http import read_json
from storage import FileEntry, Manifest, NotFound, VariantInfo
from storage.errors import StoreUnavailable

INFO = ModelInfo(base_name="base", base_sha256="b" * 64, max_model_len=128)


def manifest(owner: str, name: str, version: int = 1, base: str = INFO.base_sha256) -> Manifest:
    files = (FileEntry(path="delta.safetensors", sha256=f"{version:064x}", nbytes=1),)
    created = "2026-01-02T03:04:05+00:00"
    return Manifest(owner=owner, name=name, version=version, files=files, base_sha256=base, created_at=created)


class Shelf:
    """A repository of two variants."""

    def __init__(self) -> None:
        self.shelf = {"acme/a": manifest("acme", "a", 3), "zeta/z": manifest("zeta", "z", base="c" * 64)}

    def resolve(self, name: str) -> Manifest:
        path = name.partition("@")[0].partition(":")[0]
        if path not in self.shelf:
            raise NotFound(name)
        return self.shelf[path]

    def list_variants(self) -> list[VariantInfo]:
        return [VariantInfo(owner=m.owner, name=m.name, versions=(m.version,), aliases={}) for m in self.shelf.values()]


def request(body: bytes, pieces: int = 1) -> Request:
    size = -(-len(body) // pieces) or 1
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


async def test_a_body_in_pieces() -> None:
    assert await read_json(request(b'{"a": "\\u00e9"}', pieces=3), 100) == {"a": "é"}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b"1" * 5000],
    ids=["empty", "cut", "not utf-8", "NaN", "half a surrogate", "deep", "long number"],
)
async def test_what_is_no_json_is_a_400(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        await read_json(request(body), 10**6)


async def test_a_large_body_is_not_read_to_its_end() -> None:
    with pytest.raises(PayloadTooLarge):
        await read_json(request(b"x" * 101, pieces=10), 100)


@pytest.mark.parametrize(
    ("error", "status", "code", "param", "headers"),
    [
        (InvalidRequest("m", param="n"), 400, "invalid_request", "n", {}),
        (ContextLengthExceeded("m", param="prompt"), 400, "context_length_exceeded", "prompt", {}),
        (ModelNotFound("x/y"), 404, "model_not_found", "model", {}),
        (Unauthorized("m"), 401, "invalid_api_key", None, {"WWW-Authenticate": "Bearer"}),
        (Overloaded("m", retry_after_s=0.2), 429, "overloaded", None, {"Retry-After": "1"}),
        (DeltaUnavailable("m", retry_after_s=2.1), 503, "delta_unavailable", None, {"Retry-After": "3"}),
        (StoreUnavailable("m"), 503, "delta_unavailable", None, {"Retry-After": "5"}),
        (RuntimeError("/secret/path"), 500, "internal_error", None, {}),
    ],
)
def test_errors_as_an_openai_client_sees_them(
    error: Exception, status: int, code: str, param: str | None, headers: dict[str, str]
) -> None:
    found_status, body, found_headers = describe(error)
    detail = json.loads(body.to_json())["error"]
    assert (found_status, detail["code"], detail["param"], found_headers) == (status, code, param, headers)
    assert set(detail) == {"message", "type", "param", "code"}
    assert "secret" not in detail["message"]


async def test_names() -> None:
    catalog = Catalog(Shelf())
    assert (await catalog.target("", INFO, None)).delta is None
    assert (await catalog.target("base", INFO, frozenset())).delta is None
    target = await catalog.target("acme/a", INFO, frozenset({"acme"}))
    assert target.model == "acme/a"
    assert target.delta == Shelf().shelf["acme/a"].delta_sha256


async def test_unknown_unauthorised_and_malformed_names_look_the_same() -> None:
    catalog, seen = Catalog(Shelf()), []
    for name, owners in [("acme/no", None), ("acme/a", frozenset({"zeta"})), ("gpt-4", None), ("a/b/c", None)]:
        with pytest.raises(ModelNotFound) as caught:
            await catalog.target(name, INFO, owners)
        status, body, headers = describe(caught.value)
        seen.append((status, body.to_json().replace(name, "NAME"), headers))
    assert len({str(answer) for answer in seen}) == 1


async def test_a_variant_of_another_base_is_refused() -> None:
    with pytest.raises(BaseMismatch, match="zeta/z@1"):
        await Catalog(Shelf()).target("zeta/z", INFO, None)


async def test_the_list_has_the_caller_s_variants_of_this_base() -> None:
    catalog = Catalog(Shelf())
    assert [m.model_id for m in await catalog.variants(INFO, None)] == ["acme/a@3"]
    assert await catalog.variants(INFO, frozenset({"zeta"})) == []


async def test_lookups_do_not_wait_for_each_other() -> None:
    """A store that hangs for one name must not hold up another."""
    release = threading.Event()

    class Slow(Shelf):
        def resolve(self, name: str) -> Manifest:
            if name == "slow/one":
                release.wait(10)
            return super().resolve(name)

    import asyncio

    catalog = Catalog(Slow())
    stuck = asyncio.create_task(catalog.target("slow/one", INFO, None))
    assert (await catalog.target("acme/a", INFO, None)).delta
    assert not stuck.done()
    release.set()
    with pytest.raises(ModelNotFound):
        await stuck


def test_cards() -> None:
    variant = manifest("acme", "a", 3)
    found = cards.model_list(INFO, [variant], [64]).data
    assert [(c.id, c.parent, c.root) for c in found] == [("base", None, "base"), ("acme/a", "base", "acme/a@3")]
    assert found[1].created == 1767323045
    assert [c.max_model_len for c in found] == [INFO.max_model_len, 64]
    assert cards.variant(INFO, "acme/a:stable", variant, 64).id == "acme/a:stable"


def test_an_error_names_the_variant_as_its_client_knows_it() -> None:
    """One error, remembered by hash, is told to clients who know the same bytes by different names."""
    error = DeltaUnavailable("no answer", delta="f" * 64, retry_after_s=7)
    for owner in ("acme", "zeta"):
        told = named(error, Target(model=f"{owner}/a", manifest=manifest(owner, "a", 3)))
        assert str(told) == f"{owner}/a@3: no answer"
        assert (type(told), told.retry_after_s) == (DeltaUnavailable, 7)
    assert str(error) == "no answer"
    refused = InvalidRequest("n must be 1", param="n")
    assert named(refused, Target(model="acme/a", manifest=manifest("acme", "a"))) is refused
    assert named(error, Target(model="base")) is error
