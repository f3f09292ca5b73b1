"""How fast codes of `spectral` are decoded on a CPU, most of a cold load.

    python benchmarks/coded_integers.py [--processes 1 2] [--layers 4]

Factors of normal numbers, 256 components of 4096 x 4096; one thread. A line for one matrix after another and for
several together, as layouts fill (`bitdelta_core.delta.together`). Then a delta of so many layers of a 7B is read into
a host buffer by so many loader processes, the best of three loads. In benchmarks/results/coded_integers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import load_gaps
import numpy as np
import synthetic
import torch
from revision import commit

from bitdelta_core.delta import entropy, rans

RESULTS = Path(__file__).parent / "results" / "coded_integers.jsonl"
MATRICES, RANK, SIDE = 8, 256, 4096


def matrix(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values, uint8 classes): components spread from 3 steps down to 0.4."""
    noise = torch.randn(2 * RANK, SIDE, generator=torch.Generator().manual_seed(seed))
    q = (noise * torch.linspace(3, 0.4, RANK).repeat(2)[:, None]).round().to(torch.int8)
    return q.flatten(), entropy.best_classes(q)[0].repeat_interleave(SIDE)


def decoded() -> Iterator[dict[str, int]]:
    made = [matrix(seed) for seed in range(MATRICES)]
    codes = rans.encode(made, torch.device("cpu"))
    items = [(code.numpy(), classes.numpy()) for code, (_, classes) in zip(codes, made, strict=True)]
    for together in (1, MATRICES):
        groups = [items[i : i + together] for i in range(0, MATRICES, together)]
        started = time.perf_counter()
        found = [values for group in groups for values in entropy.decode_together(group)]
        seconds = time.perf_counter() - started
        assert all(np.array_equal(v, values.numpy()) for v, (values, _) in zip(found, made, strict=True))
        yield {"together": together, "rank": RANK, "side": SIDE, "values_per_s": round(sum(map(len, found)) / seconds)}


def loaded(counts: list[int], layers: int) -> Iterator[dict[str, int | float]]:
    model = replace(synthetic.SHAPES["llama-2-7b"], layers=layers).model()
    with tempfile.TemporaryDirectory() as work:
        delta = synthetic.write_delta(model, Path(work) / "delta", "auto")
        for count in counts:
            ways, processes = load_gaps.loaders(model, count)
            seen, values = load_gaps.Seen(), ways["process"][0].open(delta).layout.coded_values
            for _ in range(3):
                load_gaps.load(*ways["process"], delta, seen)
            processes.close()
            yield {"processes": count, "layers": layers, "values": values, "fill_s": round(min(seen.fills), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    conditions = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(), "cores": os.cpu_count()}
    conditions |= {"numpy": np.__version__, "command": "benchmarks/coded_integers.py"}
    for lines in (decoded(), loaded(arguments.processes, arguments.layers)):
        for line in lines:
            print(line, flush=True)
            with RESULTS.open("a") as out:
                out.write(json.dumps({**line, **conditions}) + "\n")


if __name__ == "__main__":
    main()
