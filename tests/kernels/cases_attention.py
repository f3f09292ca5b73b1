"""Launches of decode and prefill attention, with the settings that the rule gives the chip that is compiled for."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from triton.runtime import driver

from kernels.device import Kinds, Partials
from kernels.paged_attention.choice import Chip, DecodeConfig
from kernels.paged_attention.device import Workspace, decode, prefill
from kernels.rotary.device import Turn
from tests.kernels.compile_harness import Case
from tests.kernels.meta import entries, ints, meta, tables

COPIES = "LDGSTS.*128"
DECODE = {80: ("HMMA", COPIES, "ATOM"), 90: ("HMMA", COPIES, "ATOM", "ACQBULK", "PREEXIT")}
PREFILL = {80: ("HMMA", COPIES), 90: ("HGMMA", COPIES)}
SHARED = {80: ("HMMA", COPIES, "ATOM"), 90: ("HGMMA", COPIES, "ATOM")}


def _chip(_: object) -> Chip:
    """An A100 or an H200."""
    target = driver.active.get_current_target()
    hopper = target is not None and target.arch == 90
    return Chip(132, 227 * 1024, True) if hopper else Chip(108, 163 * 1024, False)


def _decode(
    rows: int, heads: int, kv_heads: int, dim: int, window: int | None = None, config: DecodeConfig | None = None
) -> None:
    """Where the settings want it, of what a linear with deltas left, and of heads with norms."""
    total = heads + 2 * kv_heads
    turn = Turn(
        Partials(meta(2, rows, total * dim, dtype=torch.float32), meta(rows, total * dim, dtype=torch.float32)),
        (None, None, None), 1e-5, meta(rows, dim // 2, dtype=torch.float32), meta(rows, dim // 2, dtype=torch.float32),
        entries(rows),
    )  # fmt: skip
    with patch.object(Chip, "of", _chip):
        decode(
            meta(rows, heads, dim), meta(64, 2, kv_heads, 16, dim), ints(rows, 256), ints(rows), window,
            meta(rows, heads * dim), None, None, tables(1), entries(rows), Kinds(),
            Workspace.empty(rows, heads, kv_heads, dim, "meta"), config=config,
            turn=turn if config and config.turn else None,
        )  # fmt: skip


def _prefill(rows: int, heads: int, kv_heads: int, dim: int, window: int | None = None) -> None:
    with patch.object(Chip, "of", _chip):
        prefill(
            meta(rows, heads, dim), meta(64, 2, kv_heads, 16, dim), ints(4), ints(3), ints(3, 256), window,
            meta(rows, heads * dim), rows, workspace=Workspace.empty(64, heads, kv_heads, dim, "meta"),
        )  # fmt: skip


FEW = {80: ("HMMA", "LDG.*128", "ATOM"), 90: ("HMMA", "LDG.*128", "ATOM", "ACQBULK", "PREEXIT")}
ONE = DecodeConfig(tile=64, chunk=64, splits=16, programs=0, warps=4, stages=1, direct=True, turn=True)
SMALL = replace(ONE, tile=32, chunk=32, registers=128)
SHARED_TILES = replace(ONE, stages=2)
DENSE = DecodeConfig(tile=32, chunk=1024, splits=64, programs=528, warps=4, stages=3, turn=True, registers=128)
SOME = DecodeConfig(tile=64, chunk=1024, splits=64, programs=528, warps=4, stages=3, turn=True)

CASES = [
    Case("attention decode 32/32 128, one row", lambda: _decode(1, 32, 32, 128, config=ONE), FEW),
    Case("attention decode 32/8 128, one row", lambda: _decode(1, 32, 8, 128, config=ONE), FEW),
    Case(
        "attention decode 32/32 128, one row, small tiles",
        lambda: _decode(1, 32, 32, 128, config=SMALL),
        FEW,
        archs=(90,),
    ),
    Case("attention decode 32/32 128, one row, shared", lambda: _decode(1, 32, 32, 128, config=SHARED_TILES), DECODE),
    Case("attention decode 32/32 128, turned, dense", lambda: _decode(16, 32, 32, 128, config=DENSE), DECODE),
    Case("attention decode 32/32 128, turned", lambda: _decode(16, 32, 32, 128, config=SOME), DECODE),
    Case("attention decode 32/32 128", lambda: _decode(64, 32, 32, 128), DECODE | {90: (*DECODE[90], r"CCTL\.E\.PF2")}),
    Case("attention decode 8/4 200, window", lambda: _decode(256, 8, 4, 200, 512), DECODE),
    Case("attention prefill 32/8 128", lambda: _prefill(2048, 32, 8, 128), PREFILL),
    Case("attention prefill 32/8 128, few rows", lambda: _prefill(16, 32, 8, 128, 4096), SHARED),
]
