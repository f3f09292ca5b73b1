"""The fused linears of a model in the order of the device tables."""

from __future__ import annotations

from collections.abc import Mapping

from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.parameters import Parameters
from kernels.device import Target
from kernels.fragments import TILE_ROWS
from kernels.planes import MAX_INPUTS

OPS = ("qkv", "o", "gate_up", "down")


def targets_of(config: ModelConfig) -> Mapping[str, Target]:
    """Name (`3.qkv`, `embed`, `head`) -> target, in the order of their indices. Every model has `embed` and `head`."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    for place in Parameters.of(config).linears.values():
        places.setdefault(place.target, []).append((place.start, place.rows, place.columns))
    places.setdefault("head", places["embed"])
    names = [f"{layer}.{op}" for layer in range(config.num_layers) for op in OPS]
    found = {}
    for index, name in enumerate([*names, "embed", "head"]):
        members = sorted(places[name])
        outputs = sum(rows for _, rows, _ in members)
        found[name] = Target(index, outputs, members[0][2], tuple(start for start, _, _ in members))
    return found


def misfit(config: ModelConfig) -> str | None:
    """Why the device tables cannot describe this architecture, or None."""
    q_rows, kv_rows, _ = config.qkv_rows
    for name, rows in (("q", q_rows), ("k and v", kv_rows), ("gate", config.intermediate_size)):
        if rows % TILE_ROWS:
            return f"{rows} outputs of {name} are no multiple of {TILE_ROWS}"
    widest = max(config.hidden_size, config.intermediate_size, q_rows)
    return f"{widest} inputs are more than {MAX_INPUTS}" if widest > MAX_INPUTS else None
