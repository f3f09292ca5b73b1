"""Kernels are compiled several at a time, and nothing runs meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHOSEN = ("logits 128512", "planes 4096", "rope 32 32 128", "cos_sin 128")
"""Cases that compile quickly"""
PROGRAM = """
import json, threading
from triton import knobs
from triton.runtime import driver
from kernels.compiling import together
from tests.kernels.compile_harness import Chip, cases, recording

threads = []
knobs.compilation.listener = lambda **_: threads.append(threading.current_thread().name)
chosen = [case for case in cases(90) if case.name in CASES]
driver.set_active(Chip(90))
with together(2):
    for case in chosen * 2:
        case.launch()
    inside = len(threads)
before = len(threads)
with recording(90) as kernels:
    for case in chosen:
        case.launch()
named = [kernel.metadata.name for kernel in kernels]
print(json.dumps([len(chosen), threads[:before], named, len(threads) - before]))
"""


@pytest.mark.slow
def test_kernels_compile_side_by_side_once_each(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    program = PROGRAM.replace("CASES", repr(CHOSEN))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    chosen, threads, named, later = json.loads(done.stdout)
    assert chosen == len(CHOSEN), "the cases are called otherwise"
    assert len(threads) == len(set(named)) > 1, "each is compiled once, however often it is launched"
    assert {name.startswith("compile") for name in threads} == {True}
    assert later == 0, "launched again, they are there"
