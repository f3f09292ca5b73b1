"""Measured configurations, as data: `kernels/<op>/configs/<device name>.json` maps keys to settings.

Benchmarks write the files; ops have a rule in code for devices and keys without an entry. Nothing is tuned at run time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

_ROOT = Path(__file__).parent
Settings = Mapping[str, Any]
_MOST_ROWS = 2**12
"""No key of a number of rows has more."""


def lookup(op: str, device_name: str, key: str) -> Settings | None:
    """The settings of one key of an op (its folder's name) on a device, None where nothing was measured."""
    return _table(path(op, device_name)).get(key)


def nearest(
    op: str, device_name: str, rows: int, key: Callable[[int], str], *, fewest: int = 1
) -> tuple[int, Settings] | None:
    """The settings measured for the nearest number of rows, and which that is: `rows` up to a power of two, else the
    next larger, else the next smaller.

    key: of a power of two. fewest: of no fewer rows do settings serve `rows`.
    """
    table = _table(path(op, device_name))
    if not table:
        return None
    return next(((n, table[k]) for n in _powers(rows) if n >= fewest and (k := key(n)) in table), None)


def _powers(rows: int) -> Iterator[int]:
    """Of two, the nearest first."""
    exact, most = (rows - 1).bit_length(), _MOST_ROWS.bit_length()
    yield from (1 << n for n in range(exact, max(exact + 1, most)))
    yield from (1 << n for n in reversed(range(exact)))


def path(op: str, device_name: str) -> Path:
    """Where the settings of an op on a device lie or would."""
    return _ROOT / op / "configs" / f"{device_name.replace('/', ' ')}.json"


@lru_cache(maxsize=64)
def _table(file: Path) -> Mapping[str, Settings]:
    if not file.exists():
        return MappingProxyType({})
    return MappingProxyType(json.loads(file.read_text()))
