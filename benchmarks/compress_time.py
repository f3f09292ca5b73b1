"""How long codec `auto` takes, and how large its deltas are, in the shapes of large models.

python benchmarks/compress_time.py [--shapes llama-2-7b llama-3.1-8b] [--depths 1 3]

A random base of so many layers (embeddings and head whole) and a fine-tune of it, whose difference is of low rank with
some noise, are written and compressed as `bitdelta compress --codec auto --bits 1` does. `--depths 32` measures a whole
7B or 8B, in a few minutes and 100 GB of --work. Of two depths, what a layer adds is taken for every further one:
`extrapolated` is no measurement. Sizes are told of what was written alone: matrices share one budget, so that the split
between linears and embeddings at full depth is not that of a few layers.

Time goes to: `reading` (hashes, comparing, tokens, the first moments), `decomposing` (and further moments), `spreading`
(the budget, entropy coding, and training where it is on) and `writing`. Everything is random, so what training gains
means nothing here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from fidelity import machine
from revision import commit
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic import SHAPES, Shape, write_base

from bitdelta_core.delta import auto
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.calibration import read_calibration
from bitdelta_core.delta.format import open_delta
from bitdelta_core.delta.inspect import Summary, summarise

_TELL_S = 15.0
_RANK, _RELATIVE, _NOISE = 64, 0.03, 0.5
"""Of the difference: its rank, its norm beside the weights', and how much of it is noise."""


def write_finetune(base: Path, out: Path, device: str) -> Path:
    """The base with a difference in every parameter."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    generator = torch.Generator(device).manual_seed(1)
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        save_file({n: _moved(t.to(device), generator).cpu() for n, t in tensors.items()}, out / file.name)
    return out


def _moved(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=weight.device)

    own = weight.float()
    if own.ndim == 1:
        return (own + 0.01 * drawn(*own.shape)).bfloat16()
    fading = torch.logspace(0, -1, _RANK, device=weight.device)
    low = (drawn(own.shape[0], _RANK) * fading) @ drawn(_RANK, own.shape[1])
    moved = low / low.norm() * (1 - _NOISE**2) ** 0.5
    noise = drawn(*own.shape)
    moved += noise / noise.norm() * _NOISE
    return (own + moved * (_RELATIVE * own.norm())).bfloat16()


@dataclass
class Clock:
    """When each part of a compression began, from what it reports of its progress."""

    began: dict[str, float] = field(default_factory=lambda: {"reading": time.monotonic()})
    told: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, total: int, name: str) -> None:
        part = "spreading" if name == "distillation" else "decomposing"
        if "decomposing" in self.began and done == 0 and part == "decomposing":
            part = "writing"
        elif part == "decomposing" and done == total - 1 and "writing" not in self.began:
            self.began["spreading"] = time.monotonic()  # but for the last matrix
        self.began.setdefault(part, time.monotonic())
        if time.monotonic() - self.told > _TELL_S:
            self.told = time.monotonic()
            print(f"{part}: {done} of {total}, {self.told - self.began['reading']:.0f} s", file=sys.stderr, flush=True)

    def seconds(self) -> dict[str, float]:
        ends = [*list(self.began.values())[1:], time.monotonic()]
        return {name: round(end - start, 2) for (name, start), end in zip(self.began.items(), ends, strict=True)}


def measured(shape: Shape, options: AutoOptions, device: str, work: Path) -> dict[str, Any]:
    """One compression."""
    base = write_base(shape, work / "base")
    fine = write_finetune(base, work / "fine", device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    out = auto.compress(base, fine, work / "delta", options, device=device, progress=clock)
    seconds = clock.seconds()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    found = _sizes(summarise(open_delta(out)))
    for path in (base, fine, out):
        shutil.rmtree(path)
    return {"layers": shape.layers, "seconds": sum(seconds.values()), "parts": seconds, "peak_gpu_bytes": peak, **found}


def _sizes(summary: Summary) -> dict[str, Any]:
    return {
        "nbytes": summary.nbytes,
        "bytes_by_kind": dict(summary.bytes_by_kind),
        "ratio": summary.ratio,
        "embeddings_share": round(summary.bytes_by_kind["embeddings"] / summary.nbytes, 3),
        "measured": dict(summary.provenance.get("measured", {})),
    }


def extrapolated(runs: Sequence[dict[str, Any]], layers: int) -> dict[str, Any] | None:
    """Seconds at full depth, if every further layer takes what those between the last two depths took."""
    if len(runs) < 2 or runs[-1]["layers"] == layers:
        return None
    less, more = runs[-2:]
    per_layer = (more["seconds"] - less["seconds"]) / (more["layers"] - less["layers"])
    seconds = more["seconds"] + per_layer * (layers - more["layers"])
    return {"layers": layers, "seconds_per_layer": round(per_layer, 2), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "llama-3.1-8b"], choices=list(SHAPES))
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 3], help="layers, the fewest first")
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--training", nargs="+", default=["none"], choices=["none", "factors"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--work", type=Path, help="where checkpoints are written (default: the temporary directory)")
    parser.add_argument("--commit", help="recorded; by default git is asked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compress_time.jsonl")
    args = parser.parse_args()
    conditions = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": args.commit or commit(),
        "machine": machine(args.device),
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out, tempfile.TemporaryDirectory(dir=args.work) as work:
        examples = Path(work) / "examples.txt"
        examples.write_bytes(read_calibration(None))
        measured(replace(SHAPES["tiny"], layers=1), AutoOptions(bits=args.bits), args.device, Path(work))
        for name in args.shapes:
            for training in args.training:
                options = AutoOptions(bits=args.bits, examples=examples if training == "factors" else None)
                runs = []
                for depth in args.depths:
                    runs.append(measured(replace(SHAPES[name], layers=depth), options, args.device, Path(work)))
                    print(name, training, json.dumps(runs[-1]), flush=True)
                whole = extrapolated(runs, SHAPES[name].layers)
                if whole:
                    print(name, training, "extrapolated", json.dumps(whole), flush=True)
                command = f"benchmarks/compress_time.py --shapes {name} --training {training} --bits {args.bits:g} "
                command += f"--depths {' '.join(map(str, args.depths))}"
                record = {"shape": name, **asdict(SHAPES[name]), "bits": args.bits, "training": training}
                record |= {"runs": runs, "extrapolated": whole, **conditions, "command": command}
                out.write(json.dumps(record) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
