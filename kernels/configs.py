"""Measured configurations, as data: `kernels/<op>/configs/<device name>.json` maps keys to settings.

Benchmarks write the files; ops have a rule in code for devices and keys without an entry. Nothing is tuned at run time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

_ROOT = Path(__file__).parent
Settings = Mapping[str, Any]


def lookup(op: str, device_name: str, key: str) -> Settings | None:
    """The settings of one key of an op (its folder's name) on a device, None where nothing was measured."""
    return _table(path(op, device_name)).get(key)


def path(op: str, device_name: str) -> Path:
    """Where the settings of an op on a device lie or would."""
    return _ROOT / op / "configs" / f"{device_name.replace('/', ' ')}.json"


@lru_cache(maxsize=64)
def _table(file: Path) -> Mapping[str, Settings]:
    if not file.exists():
        return MappingProxyType({})
    return MappingProxyType(json.loads(file.read_text()))
