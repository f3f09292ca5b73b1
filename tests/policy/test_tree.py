"""Rules about the tree as a whole."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import WITH_RAY

ROOT = Path(__file__).parents[2]
PACKAGES = ("bitdelta_core", "deployments", "kernels", "storage")
MAX_LINES = 400


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(f.relative_to(ROOT)): n for f in tracked("*.py") if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert not long


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_exist(package: str) -> None:
    module = importlib.import_module(package)
    exported = getattr(module, "__all__", [])
    assert list(exported) == sorted(exported)
    assert all(hasattr(module, name) for name in exported)


def test_every_public_function_and_class_of_the_packages_is_annotated() -> None:
    bare = []
    for file in tracked(*(f"{p}/**.py" for p in PACKAGES)):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.returns is None
                and not _is_kernel(node)
            ):
                bare.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bare


def _is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is in Triton's language, which has no types of Python's to annotate with."""
    return any(re.match(r"\w+\.jit\b", ast.unparse(decorator)) for decorator in function.decorator_list)


def test_no_machine_path_in_the_tree() -> None:
    forbidden = re.compile(r"(?<![\w.])/(work|farm|root|opt/bd)/")
    wrong = [
        str(f.relative_to(ROOT))
        for f in tracked("*.py", "*.md", "*.yaml", "*.toml", "*.json", "*.jsonl", "Makefile", ".ci/*")
        if f != Path(__file__) and "examples/demo/models" not in str(f) and forbidden.search(f.read_text())
    ]
    assert not wrong


def test_every_dependency_is_explained_in_the_readme() -> None:
    import tomllib

    readme = (ROOT / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=;~! ]", line)[0] for line in project["dependencies"]]
    assert not [name for name in names if f"| `{name}" not in readme]


def test_every_local_link_of_the_documents_leads_somewhere() -> None:
    broken = []
    for file in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
            if "://" not in target and not (file.parent / target).exists():
                broken.append(f"{file.relative_to(ROOT)}: {target}")
    assert not broken


def test_files_that_start_ray_are_run_by_one_process() -> None:
    """`tests/conftest.py` knows them by their names."""
    tests = {str(f.relative_to(ROOT)): f.read_text() for f in tracked("tests/**.py")}
    marked = {name for name, text in tests.items() if re.search(r"^(pytestmark = |@)pytest\.mark\.ray", text, re.M)}
    named = {name for name in tests if name.startswith(WITH_RAY)}
    assert marked == named
    assert len(marked) > 1
