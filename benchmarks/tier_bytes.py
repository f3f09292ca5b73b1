"""Bytes of one `auto` delta's linears on each tier, as the layouts plan them: nothing is made, no device is needed.

    python benchmarks/tier_bytes.py [--shape llama-2-7b] [--cases 1:1024 1:2048 0.25:384 ...] [--variants 64]

A case is bits per weight, which decide the file, and the rank of every linear's factors (less where a side is shorter),
which decides the memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from synthetic import SHAPES

from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.layout import DeviceLayout
from bitdelta_core.models.parameters import EMBED, HEAD, Parameters
from bitdelta_core.models.variant import VariantLayout

CASES = ("1:1024", "1:2048", "0.25:384", "0.25:768", "0.125:208", "0.125:496")


@dataclass(frozen=True)
class Delta:
    """What planners ask of a delta."""

    tensors: Mapping[str, TensorEntry]
    config_overrides: Mapping[str, Any] = field(default_factory=dict)


def spectral_delta(model: ModelConfig, rank: int) -> Delta:
    """Every linear of every layer."""
    found = {}
    for name, place in Parameters.of(model).linears.items():
        if name not in (EMBED, HEAD):
            sides = (place.rows, place.columns)
            most = min(rank, *sides)
            found[name] = TensorEntry(name=name, shape=sides, codec="spectral", rank=most, rows=place.rows)
    return Delta(found)


def row(model: ModelConfig, bits: float, rank: int, variants: int) -> str:
    """A line of a table."""
    delta = spectral_delta(model, rank)
    weights = sum(entry.shape[0] * entry.shape[1] for entry in delta.tensors.values())
    cpu = VariantLayout.plan(delta, model, torch.bfloat16, "cpu").nbytes
    layout = DeviceLayout.plan(delta, model, torch.bfloat16)
    form = "as integers" if layout.kinds.layers.byte_rank else "16 bits"
    read = 2 * weights + variants * layout.nbytes
    megabytes = [f"{n / 1e6:,.0f} MB".replace(",", " ") for n in (weights * bits / 8, cpu, layout.nbytes)]
    return f"| {bits:g}, {rank} | {megabytes[0]} | {megabytes[1]} | {megabytes[2]}, {form} | {read / 1e9:.1f} GB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BITS:RANK")
    parser.add_argument("--variants", type=int, default=64, help="of a decode step")
    arguments = parser.parse_args()
    model = SHAPES[arguments.shape].model()
    print(f"| bits, rank | file | on a CPU | on a GPU | read by {arguments.variants} variants and the base |")
    print("|---|---|---|---|---|")
    for case in arguments.cases:
        bits, rank = case.split(":")
        print(row(model, float(bits), int(rank), arguments.variants))


if __name__ == "__main__":
    main()
