"""JSON from strangers: bounded in size and depth, no duplicate keys, no NaN.

Not covered: what the values mean; that is the reader's business.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 32
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""The last one to the end of the text if nothing ends it, so that the time is linear in the text"""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class BadJson(ValueError):
    """The text is not JSON that we are willing to read."""


def parse_object(text: bytes, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `text` (UTF-8).

    Raises:
        BadJson: too long, nested deeper than MAX_DEPTH, not an object, a key twice, or NaN or infinity in it.
    """
    if len(text) > max_bytes:
        raise BadJson(f"{len(text)} bytes of JSON, at most {max_bytes} are read")
    if _depth(text) > MAX_DEPTH:
        raise BadJson(f"nested deeper than {MAX_DEPTH} levels")
    try:
        body = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadJson(f"not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadJson(f"expected a JSON object, found {type(body).__name__}")
    return body


def _depth(text: bytes) -> int:
    depth = deepest = 0
    for byte in _STRINGS.sub(b"", text).translate(None, _NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        if depth > deepest:
            deepest = depth
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise BadJson("a key occurs twice in one object")
    return body


def _no_constant(name: str) -> None:
    raise BadJson(f"{name} is not a JSON number")
