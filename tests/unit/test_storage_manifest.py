"""Manifests and names: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import CorruptBlob, FileEntry, InvalidName, Manifest, VariantName

SHA = "0123456789abcdef" * 4
MANIFEST = Manifest(
    owner="acme",
    name="support",
    version=7,
    files=(FileEntry(path="a/b.bin", sha256=SHA, nbytes=3), FileEntry(path="c", sha256=SHA, nbytes=0)),
    base_sha256=SHA,
    base_model="base",
    created_at="2026-01-01T00:00:00+00:00",
    metadata={"codec": "bitdelta"},
    publish_id="x",
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def body() -> dict[str, Any]:
    return json.loads(MANIFEST.to_json())


def parse(body: object) -> Manifest:
    return Manifest.from_json(json.dumps(body).encode(), key="k.json")


def test_round_trip() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), key="k") == MANIFEST


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a/./b",
        ".",
        "..",
        "a//b",
        "a/",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "x" * 256,
        "é" * 600,
    ],
)
def test_unsafe_paths(path: str) -> None:
    with pytest.raises(InvalidName):
        FileEntry(path=path, sha256=SHA, nbytes=1)
    changed = body()
    changed["files"][0]["path"] = path
    with pytest.raises(CorruptBlob, match=r"k\.json is not a manifest"):
        parse(changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", SHA[:-1]),
        ("sha256", SHA.upper()),
        ("sha256", SHA + "\n"),
        ("sha256", 7),
        ("nbytes", -1),
        ("nbytes", True),
        ("nbytes", 1.0),
        ("nbytes", 1 << 60),
        ("nbytes", None),
        ("path", None),
        ("path", "c"),
        ("path", "c/d"),
    ],
)
def test_bad_files(field: str, value: object) -> None:
    changed = body()
    changed["files"][0][field] = value
    with pytest.raises(CorruptBlob, match=r"k\.json"):
        parse(changed)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format_version", 2, "newer"),
        ("format_version", 0, "unknown"),
        ("format_version", "1", "format_version"),
        ("owner", "a/b", "owner"),
        ("name", "..", "name"),
        ("version", 0, "acme/support@0"),
        ("version", 10**9, "@1000000000"),
        ("base_sha256", "abc", "base_sha256"),
        ("files", [], "1 to 10000 files"),
        ("files", [7], "not an object"),
        ("files", {}, "'files'"),
        ("metadata", [], "'metadata'"),
        ("created_at", None, "'created_at'"),
    ],
)
def test_bad_fields_are_named(field: str, value: object, words: str) -> None:
    with pytest.raises(CorruptBlob, match=words):
        parse(body() | {field: value})
    missing = body()
    del missing[field]
    with pytest.raises(CorruptBlob, match=field):
        parse(missing)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_not_even_an_object(raw: bytes) -> None:
    with pytest.raises(CorruptBlob, match=r"k\.json is not a manifest"):
        Manifest.from_json(raw, key="k.json")


@given(field=st.sampled_from(sorted(body())), value=json_values)
def test_any_other_value_parses_or_is_corrupt(field: str, value: object) -> None:
    try:
        manifest = parse(body() | {field: value})
    except CorruptBlob:
        return
    assert Manifest.from_json(manifest.to_json(), key="again") == manifest


def test_delta_sha256_is_of_the_content_only() -> None:
    other = Manifest(
        owner="x", name="y", version=1, files=tuple(reversed(MANIFEST.files)), base_sha256="f" * 64, publish_id="z"
    )
    assert other.delta_sha256 == MANIFEST.delta_sha256
    renamed = (FileEntry(path="a/other", sha256=SHA, nbytes=3), MANIFEST.files[1])
    assert (
        Manifest(owner="x", name="y", version=1, files=renamed, base_sha256=SHA).delta_sha256 != MANIFEST.delta_sha256
    )


@pytest.mark.parametrize("text", ["acme/x", "acme/x@7", "acme/x:stable", "a.b-c_d/E.f"])
def test_names_round_trip(text: str) -> None:
    assert str(VariantName.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "x", "a/b/c", "a/b@", "a/b@0", "a/b@07", "a/b@x", "a/b:", "a/b@1:s", "-a/b", ".a/b", "a/b\n", "a/b@१", "é/x"],
)
def test_bad_names(text: str) -> None:
    with pytest.raises(InvalidName, match="expected owner/name"):
        VariantName.parse(text)
