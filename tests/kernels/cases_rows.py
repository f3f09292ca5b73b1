"""Launches of the row-wise kernels in the shapes of Llama-2-7B (4096, 11008), Llama-3.1-8B (14336) and Qwen2.5-72B."""

from __future__ import annotations

import torch

from kernels.device import Kinds, Partials, Planes, Target
from kernels.embedding.device import embed
from kernels.rms_norm.device import add_norm
from kernels.rotary.device import RopeTables, Turn, cos_sin, rope_and_cache
from kernels.silu_mul.device import silu_mul
from tests.kernels.compile_harness import Case
from tests.kernels.meta import entries, meta, tables

SIGNS = Kinds(signs=True)
COLUMNS = Kinds(signs=True, columns=True, planes=2)
EARLY = ("ACQBULK", "PREEXIT")
"""Waits for the kernel before, lets the next one start (`launches.py`): 8.0 has neither, ptxas would refuse them."""
WIDE_LOADS = {80: (r"LDG\.E\.128",), 90: (r"LDG\.E\.128", *EARLY)}
FIRST = {80: (r"LDG\.E\.128",), 90: (r"LDG\.E\.128", "PREEXIT")}
"""Of a step: waits for nothing."""


def _partials(split: int, rows: int, columns: int) -> Partials:
    """One: cuBLAS's, in the compute dtype; several: float32."""
    base = meta(split, rows, columns, dtype=torch.float32 if split > 1 else torch.bfloat16)
    return Partials(base, meta(rows, columns, dtype=torch.float32))


def _add_norm(rows: int, inputs: int, split: int, kinds: Kinds | None, wanted: int = 0) -> None:
    target, residual = Target(1, 64, inputs, (0, 32)), meta(rows, inputs, dtype=torch.float32)
    count = wanted or rows
    planes = None if kinds is None else Planes.empty(kinds.sets(target), count, inputs, "meta")
    add_norm(
        residual, _partials(split, rows, inputs) if split else None, tables(2), (0, inputs), None, entries(rows), 1e-5,
        meta(count, inputs), planes, target if planes else None, kinds or Kinds(),
        residual_out_TK=None if wanted or not split else meta(rows, inputs, dtype=torch.float32),
        rows_L=meta(count, dtype=torch.int32) if wanted else None,
    )  # fmt: skip


def _silu_mul(rows: int, inputs: int, split: int, kinds: Kinds | None) -> None:
    target = Target(1, 64, inputs)
    planes = None if kinds is None else Planes.empty(kinds.sets(target), rows, inputs, "meta")
    silu_mul(
        _partials(split, rows, 2 * inputs), tables(2), None, entries(rows), meta(rows, inputs), planes,
        target if planes else None, kinds or Kinds(),
    )  # fmt: skip


def _rope(rows: int, heads: int, kv_heads: int, dim: int, split: int, norm: bool) -> None:
    total = (heads + 2 * kv_heads) * dim
    spans = ((0, total), (total, total + dim), (total + dim, total + 2 * dim)) if norm else (None, None, None)
    angles, ints = meta(rows, dim // 2, dtype=torch.float32), entries(rows)
    turn = Turn(_partials(split, rows, total), spans, 1e-6, angles, angles, ints)
    rope_and_cache(turn, tables(2), entries(rows), meta(rows, heads, dim), meta(64, 2, kv_heads, 16, dim))


def _cos_sin(rows: int, dim: int) -> None:
    angles = meta(rows, dim // 2, dtype=torch.float32)
    cos_sin(entries(rows), entries(rows), RopeTables.empty(3, dim, "meta"), angles, angles)


def _embed(rows: int, inputs: int, kinds: Kinds) -> None:
    target, ints = Target(1, 32000, inputs), entries(rows)
    embed(ints, ints, ints, meta(32000, inputs), target, tables(2), ints, meta(rows, inputs), kinds)


CASES = [
    Case("add_norm 4096", lambda: _add_norm(16, 4096, 4, SIGNS), WIDE_LOADS),
    Case("add_norm 8192, columns", lambda: _add_norm(1, 8192, 2, COLUMNS), WIDE_LOADS),
    Case("add_norm 4096, many rows", lambda: _add_norm(256, 4096, 1, SIGNS), WIDE_LOADS),
    Case("add_norm 3584, prefill", lambda: _add_norm(2048, 3584, 1, None), WIDE_LOADS),
    Case("add_norm 4096, first layer", lambda: _add_norm(64, 4096, 0, SIGNS), WIDE_LOADS),
    Case("add_norm 4096, wanted rows", lambda: _add_norm(64, 4096, 2, SIGNS, wanted=16), WIDE_LOADS),
    Case("silu_mul 11008", lambda: _silu_mul(16, 11008, 2, SIGNS), WIDE_LOADS),
    Case("silu_mul 14336, columns", lambda: _silu_mul(1, 14336, 1, COLUMNS), WIDE_LOADS),
    Case("silu_mul 14336, prefill", lambda: _silu_mul(2048, 14336, 1, None), WIDE_LOADS),
    Case("silu_mul 29568", lambda: _silu_mul(32, 29568, 1, SIGNS), WIDE_LOADS),
    Case("rope 32 32 128", lambda: _rope(16, 32, 32, 128, 4, False), WIDE_LOADS),
    Case("rope 32 8 128, norm", lambda: _rope(16, 32, 8, 128, 1, True), WIDE_LOADS),
    Case("rope 14 2 80, norm", lambda: _rope(1, 14, 2, 80, 2, True)),
    Case("cos_sin 128", lambda: _cos_sin(16, 128), {90: EARLY}),
    Case("embed 4096", lambda: _embed(16, 4096, Kinds()), FIRST),
    Case(
        "embed 4096, all kinds",
        lambda: _embed(
            16, 4096, Kinds(signs=True, columns=True, planes=2, rank=32, dense=True, rows=True, byte_rank=32)
        ),
        FIRST,
    ),
]
