"""What every test gets."""

from __future__ import annotations

import os

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests (`make test`), a file is one's alone, for its fixtures' sake; so are all tests
    that start Ray, as two clusters would not leave each other enough."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "ray" if item.get_closest_marker("ray") else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
