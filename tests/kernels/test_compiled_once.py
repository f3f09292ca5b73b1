"""What a step's size decides must not decide how a kernel is compiled: each kind of it would pause everybody once."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import kernels

SIZES = {"T", "rows", "sequences", "row_tiles", "tiles", "first", "last", "most", "least", "table_width"}
"""Arguments that follow from how many rows, sequences or tiles a step has."""


def launched() -> dict[str, Any]:
    """Every function of the package that is launched: those named so."""
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if (name.endswith("_kernel") or name == "_prepare") and inspect.isfunction(getattr(value, "fn", None)):
                found[f"{value.fn.__module__.removeprefix('kernels.')}.{name}"] = value
    return found


def not_specialised(kernel: Any) -> set[str]:
    """Names, whether the kernel is compiled or interpreted."""
    return set((kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel))["do_not_specialize"] or ())


@pytest.mark.parametrize("name", launched())
def test_sizes_of_a_step_are_not_specialised_on(name: str) -> None:
    kernel = launched()[name]
    parameters = inspect.signature(kernel.fn).parameters.values()
    sizes = {p.name for p in parameters if p.name in SIZES and "constexpr" not in str(p.annotation)}
    assert sizes - not_specialised(kernel) == set()


def test_all_kernels_are_looked_at() -> None:
    assert len(launched()) > 20
