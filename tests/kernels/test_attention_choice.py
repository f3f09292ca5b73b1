"""Which settings attention gets where some were measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from kernels import configs
from kernels.paged_attention import choice
from kernels.paged_attention.choice import Chip, DecodeConfig, choose_decode, decode_key, decode_rule, split_rows

H200 = Chip(132, 227 * 1024, True)
HEADS = (8, 4, 128)
DEVICE = torch.device("cuda")
MEASURED = {
    4: DecodeConfig(tile=32, chunk=128, splits=64, programs=1320, warps=2, stages=3),
    64: DecodeConfig(tile=64, chunk=1024, splits=16, programs=528, warps=4, stages=4),
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(Chip, "of", lambda device: H200)
    monkeypatch.setattr(configs, "_ROOT", tmp_path)
    file = configs.path("paged_attention", "NVIDIA H200")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({decode_key(rows, *HEADS): asdict(config) for rows, config in MEASURED.items()}))


@pytest.mark.usefixtures("measured")
def test_measured_rows_have_what_was_measured() -> None:
    assert choose_decode(3, *HEADS, DEVICE) == MEASURED[4]
    assert choose_decode(64, *HEADS, DEVICE) == MEASURED[64]
    assert choose_decode(64, 4, 8, 128, DEVICE) == decode_rule(64, 4, 8, 128, H200)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("rows", "tile", "chunk"), [(1, 32, 32), (2, 32, 64), (8, 64, 128), (32, 64, 512)])
def test_fewer_rows_have_shorter_units(rows: int, tile: int, chunk: int) -> None:
    """Down to a tile; the code is the next larger measured number's."""
    found = choose_decode(rows, *HEADS, DEVICE)
    assert (found.tile, found.chunk) == (tile, chunk)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64, 65, 128, 256])
def test_the_workspace_suffices(rows: int) -> None:
    found = choose_decode(rows, *HEADS, DEVICE)
    assert found.splits == choice.splits_of(rows)
    assert rows * found.splits <= split_rows(rows)
    assert found.chunk <= MEASURED[64].chunk
