"""Processes that benchmarks/make_models.py and fidelity.py run side by side: the same script with other arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_POLL = 0.2


def launch(names: Sequence[str], jobs: int, threads: int, option: str = "--make") -> dict[str, int]:
    """This script once more for each name, with `option NAME` added, `jobs` at once; name -> its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # they share one GPU's memory
    waiting, running, done = list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            command = [sys.executable, "-u", *sys.argv, option, name]
            running[name] = subprocess.Popen(command, env=environment)
        for name, process in list(running.items()):
            if process.poll() is not None:
                done[name] = running.pop(name).returncode
                if name == "base" and done[name]:  # the others wait for it in vain
                    for other in running.values():
                        other.terminate()
                    waiting.clear()
        time.sleep(_POLL)
    return done


def failed(done: Mapping[str, int]) -> str | int:
    """For SystemExit: 0, or which ones."""
    names = [name for name, status in done.items() if status]
    return f"failed: {', '.join(names)}" if names else 0


def wait_for(file: Path) -> None:
    """Until it is there; whoever started this process ends it if it will never be."""
    while not file.is_file():
        time.sleep(_POLL)
