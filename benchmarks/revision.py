"""Which code and which command a figure is of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """HEAD, with a + where tracked files differ from it; empty without git or a repository."""
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(described, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()


def shortened(argument: str) -> str:
    """Paths by their last part: where things lay on the machine says nothing."""
    return Path(argument).name if "/" in argument else argument
