"""Launches of the stand-alone plane kernel."""

from __future__ import annotations

from kernels.device import Kinds, Planes, Target
from kernels.planes import prepare_planes
from tests.kernels.compile_harness import Case
from tests.kernels.meta import entries, meta, tables


def _prepare(rows: int, inputs: int, kinds: Kinds) -> None:
    target = Target(1, 64, inputs)
    planes = Planes.empty(kinds.sets(target), rows, inputs, "meta")
    prepare_planes(meta(rows, inputs), planes, target, tables(2), entries(rows), kinds)


CASES = [
    Case("planes 4096", lambda: _prepare(16, 4096, Kinds(signs=True)), {90: ("STG", "ACQBULK", "PREEXIT")}),
    Case("planes 11008, columns", lambda: _prepare(1, 11008, Kinds(signs=True, columns=True, planes=2))),
]
