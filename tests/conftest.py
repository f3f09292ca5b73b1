"""What every test gets."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Small matrices on few cores: more threads only fight each other. Must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton.jit decorates a kernel

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels import quick_interpreter

    quick_interpreter.install()

WITH_RAY = "tests/integration/test_serve_"
BUSY = (WITH_RAY, "tests/kernels/test_compiles.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where processes share the tests (`make test`), a file is one's alone, for its fixtures' sake. So are together all
    files that start many processes: two clusters of Ray, or one and compilers, would not leave each other enough."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "busy" if nodeid.startswith(BUSY) else super()._split_scope(nodeid)

    return Scheduling(config, log)
