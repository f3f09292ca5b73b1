"""Launches of decode and prefill attention, with the settings that the rule gives the chip that is compiled for."""

from __future__ import annotations

from unittest.mock import patch

from triton.runtime import driver

from kernels.device import Kinds
from kernels.paged_attention.choice import Chip
from kernels.paged_attention.device import Workspace, decode, prefill
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


def _decode(rows: int, heads: int, kv_heads: int, dim: int, window: int | None = None) -> None:
    with patch.object(Chip, "of", _chip):
        decode(
            meta(rows, heads, dim), meta(64, 2, kv_heads, 16, dim), ints(rows, 256), ints(rows), window,
            meta(rows, heads * dim), None, None, tables(1), entries(rows), Kinds(),
            Workspace.empty(rows, heads, kv_heads, dim, "meta"),
        )  # fmt: skip


def _prefill(rows: int, heads: int, kv_heads: int, dim: int, window: int | None = None) -> None:
    with patch.object(Chip, "of", _chip):
        prefill(
            meta(rows, heads, dim), meta(64, 2, kv_heads, 16, dim), ints(4), ints(3), ints(3, 256), window,
            meta(rows, heads * dim), rows, workspace=Workspace.empty(64, heads, kv_heads, dim, "meta"),
        )  # fmt: skip


CASES = [
    Case("attention decode 32/32 128", lambda: _decode(64, 32, 32, 128), DECODE | {90: (*DECODE[90], r"CCTL\.E\.PF2")}),
    Case("attention decode 8/4 200, window", lambda: _decode(256, 8, 4, 200, 512), DECODE),
    Case("attention prefill 32/8 128", lambda: _prefill(2048, 32, 8, 128), PREFILL),
    Case("attention prefill 32/8 128, few rows", lambda: _prefill(16, 32, 8, 128, 4096), SHARED),
]
