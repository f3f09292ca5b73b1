"""How fast codes of `spectral` are decoded on a CPU, most of a cold load: python benchmarks/coded_integers.py

Factors of normal numbers, 256 components of 4096 x 4096; one thread. A line for one matrix after another and for
several together, as layouts fill (`bitdelta_core.delta.together`), in benchmarks/results/coded_integers.jsonl.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from bitdelta_core.delta import entropy, rans

RESULTS = Path(__file__).parent / "results" / "coded_integers.jsonl"
MATRICES, RANK, SIDE = 8, 256, 4096


def matrix(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values, uint8 classes): components spread from 3 steps down to 0.4."""
    noise = torch.randn(2 * RANK, SIDE, generator=torch.Generator().manual_seed(seed))
    q = (noise * torch.linspace(3, 0.4, RANK).repeat(2)[:, None]).round().to(torch.int8)
    return q.flatten(), entropy.best_classes(q)[0].repeat_interleave(SIDE)


def main() -> None:
    made = [matrix(seed) for seed in range(MATRICES)]
    codes = rans.encode(made, torch.device("cpu"))
    items = [(code.numpy(), classes.numpy()) for code, (_, classes) in zip(codes, made, strict=True)]
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    conditions = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": described.stdout.strip(), "cores": os.cpu_count()}
    conditions |= {"numpy": np.__version__, "rank": RANK, "side": SIDE, "command": "benchmarks/coded_integers.py"}
    for together in (1, MATRICES):
        groups = [items[i : i + together] for i in range(0, MATRICES, together)]
        started = time.perf_counter()
        found = [values for group in groups for values in entropy.decode_together(group)]
        seconds = time.perf_counter() - started
        assert all(np.array_equal(v, values.numpy()) for v, (values, _) in zip(found, made, strict=True))
        rate = sum(map(len, found)) / seconds
        print(f"{together} together: {rate / 1e6:.0f} million values a second", flush=True)
        with RESULTS.open("a") as out:
            out.write(json.dumps({"together": together, "values_per_s": round(rate), **conditions}) + "\n")


if __name__ == "__main__":
    main()
