"""What every test gets."""

from __future__ import annotations

import os

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
