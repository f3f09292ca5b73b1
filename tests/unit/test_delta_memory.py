"""Compressing holds one parameter at a time: twelve times the depth takes no more memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compress_memory.py"
PLAIN_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""What is freed is given back: else the C library keeps 13 MB in one run and none in the next, at any depth."""


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    out = tmp_path / "memory.jsonl"
    command = [sys.executable, SCRIPT, "--depths", "4", "48", "--hidden", "256", "--out", out]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | PLAIN_MALLOC, cwd=SCRIPT.parents[1])
    shallow, deep = (json.loads(line)["bytes"] for line in out.read_text().splitlines())
    added = deep["checkpoint"] - shallow["checkpoint"]
    assert added > 48 * 2**20
    for kind in ("anonymous", "total"):
        assert deep[kind] - shallow[kind] < 0.25 * added, (shallow, deep)
