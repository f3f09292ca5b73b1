"""Peak memory of compressing at several depths: python benchmarks/compress_memory.py [--depths 4 16] [--hidden 512]

For each depth a random Llama-shaped base and fine-tune are written, and compressed in a process of their own whose
resident memory is sampled. `anonymous` is what the process holds for itself; `total` also counts pages of the mapped
checkpoint files, which the kernel may drop at any time. Both are peaks above what the process took before it began.
Without distillation: that step holds both models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from revision import commit
from safetensors.torch import save_file

from bitdelta_core.delta.compress import compress

VOCABULARY = 1024
_SAMPLE_S = 0.001


def write_checkpoint(path: Path, hidden: int, depth: int, *, shift: float) -> None:
    """A random checkpoint with a shard per layer; `shift` sets its distance from the one with shift 0."""
    path.mkdir()
    wide = 2 * hidden
    heads = hidden // 64
    layer = {
        **{f"self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"},
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    ends = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    groups = [{f"model.layers.{i}.{n}": s for n, s in layer.items()} for i in range(depth)]
    weight_map = {}
    for number, shapes in enumerate([*groups, {**ends, "model.norm.weight": (hidden,)}]):
        file = f"model-{number:05d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        moved = {n: (t + shift * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in tensors.items()}
        save_file(moved, path / file)
        weight_map |= dict.fromkeys(shapes, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))


def resident() -> dict[str, int]:
    """Bytes of this process: anonymous and total."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {"anonymous": "RssAnon", "total": "VmRSS"}
    return {name: 1024 * int(lines[field].split()[0]) for name, field in kib.items()}


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """Peaks of `resident()` above its values at the start, filled in while the block runs."""
    start = resident()
    found = dict.fromkeys(start, 0)
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            found.update({name: max(found[name], value - start[name]) for name, value in resident().items()})

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def measure(root: Path) -> dict[str, int]:
    """Compress root/fine against root/base in this process; a first, tiny run has warmed the libraries up."""
    torch.set_num_threads(1)
    compress(root / "warm-base", root / "warm-fine", root / "warm-delta")
    with peaks() as found:
        compress(root / "base", root / "fine", root / "delta")
    return found


def at_depth(hidden: int, depth: int) -> dict[str, int]:
    """Peaks at one depth, from a fresh process."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        for name, layers, width in (("", depth, hidden), ("warm-", 1, 64)):
            write_checkpoint(root / f"{name}base", width, layers, shift=0)
            write_checkpoint(root / f"{name}fine", width, layers, shift=0.01)
        size = sum(f.stat().st_size for f in (root / "base").glob("*.safetensors"))
        command = [sys.executable, __file__, "--measure", str(root)]
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(root / "cache"),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return {"checkpoint": size, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compress_memory.jsonl")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        for depth in args.depths:
            record = {
                "depth": depth,
                "hidden": args.hidden,
                "bytes": at_depth(args.hidden, depth),
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "commit": commit(),
                "machine": {"cores": os.cpu_count(), "ram_gb": round(ram / 1e9, 1)},
                "torch": torch.__version__,
                "command": f"benchmarks/compress_memory.py --depths {depth} --hidden {args.hidden}",
            }
            out.write(json.dumps(record) + "\n")
            print(json.dumps(record["bytes"] | {"depth": depth}))


if __name__ == "__main__":
    main()
