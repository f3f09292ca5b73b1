"""Every kernel compiles for the oldest supported chip and for Hopper, with the instructions meant, and spills nothing
where it multiplies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.compile_harness import ARCHS

ROOT = Path(__file__).parents[2]
FOUR_WORDS = (
    "sizePerThread = [1, 4], threadsPerWarp = [1, 32], ",
    "sizePerThread = [4], threadsPerWarp = [32], ",
)


SHARED = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have: 8.6 and 8.9, which run what is made for 8.0, have the least"""
SWEPT = {"linear signs 12288x4096 T64 large"}
"""What a benchmark tries where there is more: an 8.0 has 163 KB"""
Harness = dict[int, subprocess.Popen[str]]


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """One process for each architecture, at the same time; kernels of this process may be the interpreter's."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_harness", "--json", "--arch"]
    started = {
        arch: subprocess.Popen(
            [*command, str(arch)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for arch in ARCHS
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles(arch: int, harness: Harness) -> None:
    output, errors = harness[arch].communicate()
    assert harness[arch].returncode == 0, errors[-2000:]
    compiled = [json.loads(line) for line in output.splitlines()]
    assert compiled
    spilled = [f"{c['case']}: {c['kernel']}: {c['spilled']}, {c['stack']} B" for c in compiled if c["spilled"]]
    assert not spilled, f"local memory where matrices are multiplied on sm_{arch}: {spilled}"
    least = [c for c in compiled if c["case"] not in SWEPT]
    large = [f"{c['case']}: {c['kernel']}: {c['shared']} B" for c in least if c["shared"] > SHARED[arch]]
    assert not large, f"more shared memory than a program may have: {large}"
    dropped = [f"{c['case']}: {c['kernel']}" for c in compiled if c["dropped"]]
    assert not dropped, f"ptxas dropped matrix products: {dropped}"
    wrong = [
        layout for c in compiled for layout in c["fragments"] if not layout.partition("<{")[2].startswith(FOUR_WORDS)
    ]
    assert not wrong, "assembly takes registers as they are: each lane must hold four words that follow each other"
    assert any(c["fragments"] for c in compiled)
