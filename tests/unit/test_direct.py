"""What the picker of direct streaming makes of a body, before any replica has seen it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.direct import Picker
from storage import NotFound, VariantName


def picker() -> Any:
    """One that knows `acme/known`."""

    async def info() -> None:
        return None

    async def target(model: str, info: None, owners: Any) -> Any:
        if str(VariantName.parse(model)) != "acme/known":
            raise NotFound(model)
        return SimpleNamespace(delta="0" * 64)

    found = object.__new__(Picker)
    found._gateway, found._catalog = SimpleNamespace(info=info), SimpleNamespace(target=target)  # pyright: ignore
    return found


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"5", b'{"model": null}', b'{"model": 5}', b'{"model": ["acme/known"]}', b'{"model": {}}', b"{",
     b"[" * 100_000, b'{"model": "acme/unknown"}', b"{}", b"\xff"],
)  # fmt: skip
async def test_whatever_a_replica_will_refuse_goes_to_any(body: bytes) -> None:
    assert await picker()._delta(body) is None


async def test_a_variant_goes_where_it_is() -> None:
    assert await picker()._delta(b'{"model": "acme/known"}') == "0" * 64
