"""How fast a delta comes into the slab: from disk, and from pinned memory, next to this machine's copy bandwidth.

    python benchmarks/load.py [--shape llama-2-7b] [--kinds row row_col lora] [--repeats 3]

Per kind: opening (headers, checks against the base), filling a pinned buffer from the page cache (reordering signs for
the tensor cores), copying it to the slab as a running engine does. The peer is one plain copy of the same size. How
long running sequences wait while deltas load is in `engine.py`. JSON lines in benchmarks/results/load.jsonl.
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

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.engine.accelerator import accelerator_of
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.device.layout import DeviceLayout


def seconds(repeats: int, work: Callable[[], object]) -> float:
    """Median of the wall clock."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(report: Report, base: Path, delta: Path, kind: str, repeats: int, dtype: torch.dtype) -> None:
    """One kind of delta."""
    device, checkpoint = gpu_timing.device(), Checkpoint(base)
    decoder = Decoder(config := synthetic.ModelConfig.from_hf(checkpoint.config), random_weights(config, dtype))
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names}

    def opened() -> tuple[DeltaReader, DeviceLayout]:
        reader = open_delta(delta, expected_base_sha256=checkpoint.sha256(), base_shapes=shapes)
        reader.map_files()
        return reader, DeviceLayout.plan(reader.config, config, dtype)

    reader, layout = opened()
    accelerator = accelerator_of(device)
    host = accelerator.host_buffer(layout.nbytes)
    extent = torch.full((layout.nbytes,), 255, dtype=torch.uint8, device=device)
    open_s = seconds(repeats, opened)
    fill_s = seconds(repeats, lambda: layout.fill(reader, host, decoder))
    stage_s = seconds(repeats + 2, lambda: accelerator.fill(extent, host))
    if not report.check(f"{kind}: the slab's bytes", float((extent.cpu() != host).sum()), 0.0):
        return
    copy = gpu_timing.copy_bandwidth(max(layout.nbytes, 1 << 20))
    record = {
        "kind": kind,
        "nbytes": layout.nbytes,
        "file_bytes": sum(f.stat().st_size for f in delta.iterdir()),
        "open_s": round(open_s, 4),
        "fill_s": round(fill_s, 4),
        "fill_gb_per_s": round(layout.nbytes / fill_s / 1e9, 2),
        "stage_s": round(stage_s, 4),
        "stage_gb_per_s": round(layout.nbytes / stage_s / 1e9, 2),
        "copy_gb_per_s": round(copy / 1e9, 2),
        "stage_of_copy": round(layout.nbytes / stage_s / copy, 3),
        "disk_to_slab_s": round(open_s + fill_s + stage_s, 4),
    }
    print("  ".join(f"{k}={v}" for k, v in record.items()), flush=True)
    report.write({"base": base.name, **record})


def main() -> int:
    parser = engine_cases.base_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=engine_cases.KINDS, default=engine_cases.KINDS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    report = Report("load", arguments.dry_run, gpu_timing.read_bandwidth())
    with engine_cases.workplace(arguments) as work:
        for kind in arguments.kinds:
            base, delta = engine_cases.on_disk(arguments.shape, kind, work)
            measure(report, base, delta, kind, arguments.repeats, dtype)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
