"""What the README says to type exists: every `bitdelta` command and flag, every `make` verb, every Python block."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest
import typer

from deployments.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/serving.md", "docs/storage.md", "docs/delta-format.md")
COMMANDS = typer.main.get_command(app)


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def command_lines(document: str) -> list[list[str]]:
    """Words of each `bitdelta ...` line in the document's shell blocks, continuation lines joined."""
    text = "\n".join(blocks(document, "(?:bash|sh|console)")).replace("\\\n", " ")
    lines = re.findall(r"(?:^|&& |\$ )bitdelta ([^\n#&|>]+)", text, flags=re.MULTILINE)
    return [line.split() for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_exist(document: str) -> None:
    assert isinstance(COMMANDS, click.Group) or hasattr(COMMANDS, "commands")
    known = COMMANDS.commands  # pyright: ignore[reportAttributeAccessIssue]
    for name, *words in command_lines(document):
        if name.startswith("-"):
            continue
        assert name in known, f"{document}: bitdelta {name}"
        flags = {flag for p in known[name].params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
        unknown = [w for w in words if w.startswith("--") and w.split("=")[0] not in flags]
        assert not unknown, f"{document}: bitdelta {name} {unknown}"


def test_make_verbs_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(blocks("README.md", "(?:bash|sh|console)"))))
    assert {"demo", "test"} <= used <= verbs


def test_ci_runs_the_readme_test_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_compile(document: str) -> None:
    for block in blocks(document, "python"):
        compile(block, document, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
