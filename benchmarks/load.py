"""How fast a delta comes into the slab: from disk, and from pinned memory, next to this machine's copy bandwidth.

    python benchmarks/load.py [--shape llama-2-7b] [--kinds row row_col lora auto] [--repeats 3]

Per kind: opening (headers, checks against the base), filling a pinned buffer from the page cache (reordering signs for
the tensor cores), copying it to the slab as a running engine does: `stage_of_copy` is that over one plain copy of the
same size from the same pinned memory, copies of both kinds in turn. The base's weights are made on the device; no
checkpoint is needed. How long running sequences wait while deltas load is in `engine.py`. JSON lines in
benchmarks/results/load.jsonl.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import engine_cases
import gpu_timing
import synthetic
import torch
from device_world import random_weights
from gpu_timing import Report

from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.engine.accelerator import Accelerator, accelerator_of
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.layout import DeviceLayout
from bitdelta_core.models.parameters import Parameters
from bitdelta_core.models.weights import Weights


def seconds(repeats: int, work: Callable[[], object]) -> float:
    """Median of the wall clock."""
    return statistics.median(_once(work) for _ in range(repeats))


def _once(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copies(accelerator: Accelerator, extent: torch.Tensor, host: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Seconds of the engine's copy and of one plain copy, both by the wall clock until the bytes are there; medians."""

    def plain() -> None:
        extent.copy_(host, non_blocking=True)
        accelerator.synchronize()

    plain()
    pairs = [(_once(lambda: accelerator.fill(extent, host)), _once(plain)) for _ in range(repeats)]
    return statistics.median(ours for ours, _ in pairs), statistics.median(theirs for _, theirs in pairs)


def measure(report: Report, model: ModelConfig, weights: Weights, delta: Path, kind: str, repeats: int) -> None:
    """One kind of delta."""
    device, dtype = gpu_timing.device(), weights.vectors_V.dtype
    parameters = Parameters.of(model)
    shapes = {name: (place.rows, place.columns) for name, place in parameters.linears.items()}
    shapes |= {name: (span.stop - span.start,) for name, span in parameters.vectors.items()}

    def opened() -> tuple[DeltaReader, DeviceLayout]:
        reader = open_delta(delta, expected_base_sha256=synthetic.NO_BASE, base_shapes=shapes)
        reader.map_files()
        return reader, DeviceLayout.plan(reader.config, model, dtype)

    reader, layout = opened()
    accelerator = accelerator_of(device)
    host = accelerator.host_buffer(layout.nbytes)
    extent = torch.full((layout.nbytes,), 255, dtype=torch.uint8, device=device)
    open_s = seconds(repeats, opened)
    first_fill_s = _once(lambda: layout.fill(reader, host, weights))
    fill_s = seconds(repeats, lambda: layout.fill(reader, host, weights))
    accelerator.synchronize()
    accelerator.fill(extent, host)
    if not report.check(f"{kind}: the slab's bytes", float((extent.cpu() != host).sum()), 0.0):
        return
    stage_s, copy_s = copies(accelerator, extent, host, 3 * repeats)
    record = {
        "kind": kind,
        "nbytes": layout.nbytes,
        "file_bytes": sum(f.stat().st_size for f in delta.iterdir()),
        "threads": torch.get_num_threads(),
        "open_s": round(open_s, 4),
        "first_fill_s": round(first_fill_s, 4),
        "fill_s": round(fill_s, 4),
        "fill_gb_per_s": round(layout.nbytes / fill_s / 1e9, 2),
        "stage_s": round(stage_s, 5),
        "stage_gb_per_s": round(layout.nbytes / stage_s / 1e9, 2),
        "copy_gb_per_s": round(layout.nbytes / copy_s / 1e9, 2),
        "stage_of_copy": round(copy_s / stage_s, 3),
        "disk_to_slab_s": round(open_s + fill_s + stage_s, 4),
    }
    print(engine_cases.line(record), flush=True)
    report.write({"base": delta.parent.name, **record})


def main() -> int:
    parser = engine_cases.base_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=engine_cases.KINDS, default=engine_cases.KINDS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    report = engine_cases.report("load", arguments)
    model = synthetic.SHAPES[arguments.shape].model()
    weights = random_weights(model, dtype)
    with engine_cases.workplace(arguments) as work:
        for kind in arguments.kinds:
            delta = work / "without-base" / arguments.shape / kind
            if not delta.exists():
                delta.parent.mkdir(parents=True, exist_ok=True)
                engine_cases.timed(f"delta {kind} written", lambda k=kind, d=delta: synthetic.write_delta(model, d, k))
            measure(report, model, weights, delta, kind, arguments.repeats)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
