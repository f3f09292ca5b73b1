"""Every kernel compiles for the oldest supported chip and for Hopper, with the instructions meant, unspilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_harness import ARCHS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles(arch: int) -> None:
    """In a process of its own: kernels of this one may be the interpreter's."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_harness", "--arch", str(arch), "--json"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert compiled
    spilled = [f"{c['case']}: {c['kernel']}: {c['stack']} B" for c in compiled if c["stack"]]
    assert not spilled, f"local memory on sm_{arch}: {spilled}"
