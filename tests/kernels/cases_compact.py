"""Launches of products with kept values, and of the kernels that unpack them."""

from __future__ import annotations

import torch

from kernels.delta_linear.compact import CompactConfig, candidates, compact, rule
from kernels.delta_linear.triton_compact_unpack import add_kept
from kernels.device import Kinds, Target
from tests.kernels.compile_harness import Case
from tests.kernels.meta import ints, meta, tables

QKV, DOWN = Target(1, 12288, 4096, (0, 4096, 8192)), Target(1, 4096, 11008)
TALL, SHORT = Kinds(compact=2, tall=True), Kinds(compact=2)
BMMA = ("BMMA.168256.AND.POPC", "LDG.E.*128", "SHFL.BFLY")
NEEDS = {80: BMMA, 90: (*BMMA, "ACQBULK", "UBLKPF")}


def _compact(target: Target, rows: int, kinds: Kinds, config: CompactConfig | None = None, add: bool = False) -> None:
    delta = meta(rows, target.outputs, dtype=torch.float32)
    compact(
        meta(rows, target.inputs), target, tables(2), ints(rows, 4), kinds, delta, add=add,
        config=config or rule(kinds),
    )  # fmt: skip


def _swept() -> None:
    """All that a benchmark would try."""
    for config in candidates(TALL)[1:]:
        _compact(QKV, 64, TALL, config)


CASES = [
    Case("compact 12288x4096 T64", lambda: _compact(QKV, 64, TALL), NEEDS),
    Case("compact 12288x4096 T1", lambda: _compact(QKV, 1, TALL), NEEDS),
    Case("compact 4096x11008 1 bit", lambda: _compact(DOWN, 64, Kinds(compact=1, tall=True)), NEEDS),
    Case("compact 4 bits, added", lambda: _compact(QKV, 16, Kinds(compact=4, tall=True), add=True), NEEDS),
    Case("compact masks of 16", lambda: _compact(QKV, 64, SHORT), NEEDS),
    Case("compact 4 bits, masks of 16", lambda: _compact(DOWN, 64, Kinds(compact=4)), NEEDS),
    Case("compact, what is swept", _swept, NEEDS),
    Case("compact unpack", lambda: _compact(QKV, 16, SHORT, CompactConfig("unpack"))),
    Case("compact merge", lambda: add_kept(QKV, tables(2), 1, meta(4096, QKV.inputs), rows=(4096, 8192))),
]
