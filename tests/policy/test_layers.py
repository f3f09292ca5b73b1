"""Imports run one way: deployments -> {bitdelta_core, storage}, bitdelta_core -> kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "kernels": {"bitdelta_core", "storage", "deployments", "ray", "boto3", "fastapi", "transformers"},
    "bitdelta_core": {"storage", "deployments", "ray", "boto3", "fastapi", "starlette"},
    "storage": {"bitdelta_core", "kernels", "deployments", "torch", "ray", "transformers", "safetensors"},
    "deployments": {"kernels"},
}


def imported(file: Path) -> Iterator[str]:
    """Top-level names of everything that the file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_imports_run_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = {f"{f.relative_to(ROOT)}: {name}" for f in files for name in imported(f) if name in FORBIDDEN[room]}
    assert not wrong


def test_only_the_replica_joins_bytes_to_tensors() -> None:
    """torch stays out of the ingress and the router: they run on nodes without a GPU."""
    for file in sorted((ROOT / "deployments").glob("*.py")):
        if file.name != "replica.py":
            assert "torch" not in set(imported(file)), file.name
