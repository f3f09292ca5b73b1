"""Launches of decode-sized linears with sign planes."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.delta_linear.choice import Config, large, ringed, rule
from kernels.delta_linear.device import delta_linear, partials_of
from kernels.device import Kinds, Planes, Target
from tests.kernels.compile_harness import Case
from tests.kernels.meta import ints, meta, tables

SIGNS, SINGLE = Kinds(signs=True), Kinds(signs=True, single=True)
COLUMNS = Kinds(signs=True, columns=True, planes=2)
QKV, DOWN = Target(1, 12288, 4096, (0, 4096, 8192)), Target(1, 4096, 11008)
STREAMED = ("BMMA.168256.AND.POPC", "LDGSTS.*128", "LDS.128")
BMMA = {80: STREAMED, 90: STREAMED}
SEVERAL = {arch: (*BMMA[arch], "IMMA.16832.U8.U8", "IMMA.16832.U8.S8") for arch in BMMA}
RING = {90: ("BMMA.168256.AND.POPC", "HGMMA", "LDGSTS.*128", "LDS.128", "UTMALDG", "ACQBULK", "USETMAXREG")}
ROWS = {90: ("BMMA.168256.AND.POPC", "LDGSTS.*128", "LDS.128", "ACQBULK", "USETMAXREG")}
FLAT = {80: (*BMMA[80], "HMMA.16816"), 90: (*BMMA[90], "HGMMA")}


def linear(target: Target, rows: int, kinds: Kinds, config: Config | None = None) -> None:
    config = config or rule(target, rows, kinds, b1=True)
    planes = Planes.empty(kinds.sets(target), rows, target.inputs, "meta") if kinds.signs else None
    out = partials_of(target, rows, kinds, torch.bfloat16, "meta", config=config)
    delta_linear(
        meta(rows, target.inputs), planes, meta(target.outputs, target.inputs), target, tables(2),
        ints(rows, 4), kinds, out, meta(0, dtype=torch.uint8), config=config,
    )  # fmt: skip


def ring(target: Target, rows: int, kinds: Kinds) -> None:
    linear(target, rows, kinds, ringed(rule(target, rows, kinds, b1=True), rows, kinds))


CASES = [
    Case("linear ring 12288x4096 T1", lambda: ring(QKV, 1, Kinds()), {90: ("HGMMA", "UTMALDG", "ACQBULK")}, (90,)),
    Case("linear ring 12288x4096 T16", lambda: ring(QKV, 16, SINGLE), RING, (90,)),
    Case("linear ring 4096x11008 T32", lambda: ring(DOWN, 32, SINGLE), RING, (90,)),
    Case("linear ring 12288x4096 T16 columns", lambda: ring(QKV, 16, replace(SINGLE, columns=True)), RING, (90,)),
    Case("linear stream 4096x11008 T64", lambda: ring(DOWN, 64, SINGLE), BMMA, (90,)),
    Case("linear rows 12288x4096 T64", lambda: ring(QKV, 64, SIGNS), RING, (90,)),
    Case("linear rows 4096x5120 T256", lambda: ring(Target(1, 4096, 5120), 256, SIGNS), ROWS, (90,)),
    Case("linear rows 4096x14336 T256", lambda: ring(Target(1, 4096, 14336), 256, SIGNS), ROWS, (90,)),
    Case("linear rows 4096x11008 T16 columns", lambda: ring(DOWN, 16, replace(SIGNS, columns=True)), RING, (90,)),
    Case("linear flat 12288x4096 T1", lambda: linear(QKV, 1, SIGNS), FLAT),
    Case("linear flat 12288x4096 T16", lambda: linear(QKV, 16, SIGNS), FLAT | {90: (*FLAT[90], "ACQBULK")}),
    Case("linear flat 12288x4096 T32 single", lambda: linear(QKV, 32, SINGLE), FLAT),
    Case("linear signs 12288x4096 T64 single", lambda: linear(QKV, 64, SINGLE), BMMA),
    Case("linear signs 12288x4096 T64", lambda: linear(QKV, 64, SIGNS), SEVERAL),
    Case("linear signs 4096x11008 T64", lambda: linear(DOWN, 64, SIGNS), SEVERAL),
    Case("linear signs 12288x4096 T64 large", lambda: linear(QKV, 64, SIGNS, large(QKV)), SEVERAL),
    Case("linear flat 4096x11008 T32", lambda: linear(DOWN, 32, SIGNS), FLAT),
    Case("linear flat 4096x11008 T16 single", lambda: linear(DOWN, 16, SINGLE), FLAT),
    Case("linear base 12288x4096 T8", lambda: linear(QKV, 8, Kinds()), {80: ("HMMA.16816",), 90: ("HGMMA",)}),
    Case("linear signs 12288x4096 T256 columns", lambda: linear(QKV, 256, COLUMNS), BMMA),
    # Short loops of a known length are where products got lost.
    Case("linear base 4096x1024 T8", lambda: linear(Target(1, 4096, 1024), 8, Kinds()), {90: ("HGMMA",)}, archs=(90,)),
    Case("linear unpack", lambda: linear(QKV, 16, COLUMNS, Config("unpack")), {80: ("HMMA",), 90: ("MMA",)}),
]
