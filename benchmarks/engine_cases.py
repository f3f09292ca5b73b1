"""What the benchmarks of whole engines share: their options, a checkpoint and a delta of random numbers, the config."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import synthetic

from bitdelta_core import EngineConfig

KINDS: tuple[synthetic.Kind, ...] = ("row", "row_col", "lora")


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark that needs a checkpoint."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=sorted(synthetic.SHAPES), default="llama-2-7b")
    made.add_argument("--work", type=Path, default=None, help="keeps the checkpoint there between runs")
    made.add_argument("--dry-run", action="store_true", help="write no results")
    return made


def engine_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark that plays a load; its variants and rates are its own."""
    made = base_parser(description)
    made.add_argument("--kind", choices=KINDS, default="row")
    made.add_argument("--seconds", type=float, default=20.0)
    made.add_argument("--longest", type=int, default=1024)
    made.add_argument("--max-num-seqs", type=int, default=64)
    made.add_argument("--slab-gb", type=float, default=None, help="None: the engine's own choice")
    return made


@contextmanager
def workplace(arguments: argparse.Namespace) -> Iterator[Path]:
    """`--work`, or a directory for this run."""
    if arguments.work is not None:
        yield arguments.work
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def on_disk(shape: str, kind: synthetic.Kind, work: Path) -> tuple[Path, Path]:
    """A base and a delta, made unless they lie there."""
    base, delta = work / shape, work / f"{shape}-{kind}"
    if not base.exists():
        synthetic.write_base(synthetic.SHAPES[shape], base)
    if not delta.exists():
        synthetic.write_delta(base, delta, kind)
    return base, delta


def slab_bytes(arguments: argparse.Namespace) -> int | None:
    return None if arguments.slab_gb is None else int(arguments.slab_gb * 1e9)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(max_num_seqs=arguments.max_num_seqs, slab_bytes=slab_bytes(arguments))
