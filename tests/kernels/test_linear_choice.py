"""Which configuration a decode-sized linear gets: the rule, what was measured, what a benchmark should try."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from kernels import configs
from kernels.delta_linear import choice
from kernels.delta_linear.choice import FLAT_ROWS, Config, candidates, choose, key, program_of, ringed, rule, settings
from kernels.delta_linear.device import member_blocks, member_tiles
from kernels.delta_linear.self_check import SelfCheck, native_b1
from kernels.device import Kinds, Target

SIGNS = Kinds(signs=True)
SHAPES = [
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (48, 40),
]
KINDS = {"base": Kinds(), "signs": SIGNS, "columns": Kinds(signs=True, columns=True, planes=2)}


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where its measured configurations lie. Its binary tensor core passes."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(choice, "self_check", lambda device: SelfCheck(True, ""))
    monkeypatch.setattr(choice, "ring_check", lambda device: SelfCheck(True, ""))
    monkeypatch.setattr(choice, "_shared_bytes", lambda device: choice._SHARED_BYTES)
    monkeypatch.setattr(configs, "_ROOT", tmp_path)
    configs._table.cache_clear()
    file = configs.path("delta_linear", "NVIDIA H200")
    file.parent.mkdir(parents=True)
    return file


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16, 64, 128, 256])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_candidates_begin_with_the_rule(shape: tuple[int, int], rows: int, kinds: Kinds) -> None:
    target = Target(0, *shape)
    found = candidates(target, rows, kinds)
    assert found[0] == rule(target, rows, kinds, b1=True)
    assert len(set(found)) == len(found) <= 60
    assert {c.impl for c in found} == ({"flat", "signs"} if rows <= 2 * FLAT_ROWS else {"signs"})
    assert all(c.split(target, target.outputs, "cpu") == 1 for c in found if c.impl != "flat")
    assert all(c.tiles * c.spread % c.warps == 0 for c in found)


def test_rule() -> None:
    square, wide = Target(0, 4096, 4096), Target(0, 22016, 4096)
    assert rule(square, 8, SIGNS, b1=True).impl == "flat"
    assert rule(wide, 8, SIGNS, b1=True).spread == 1
    assert rule(Target(0, 4096, 11008), 8, SIGNS, b1=True).spread == 4
    for shared in (46, 78, 100):
        found = rule(wide, 8, SIGNS, b1=True, shared=shared * 1024)
        assert (found.depth - 1) * found.tiles * 16 * 512 <= shared * 1024
    assert rule(square, FLAT_ROWS + 1, SIGNS, b1=True).impl == "flat"
    assert rule(square, 2 * FLAT_ROWS + 1, SIGNS, b1=True).impl == "signs"
    for kinds in (Kinds(), replace(SIGNS, single=True)):
        assert rule(square, FLAT_ROWS + 1, kinds, b1=True).impl == "signs"
    assert rule(square, 8, SIGNS, b1=False).impl == "unpack"
    assert rule(square, 8, Kinds(), b1=False).impl == "flat"


def test_what_the_ring_takes(on_h200: Path) -> None:
    """On Hopper: the base, and one plane of signs; up to 64 rows where a variant has several."""
    target, device, single = Target(0, 4096, 4096), torch.device("cuda"), replace(SIGNS, single=True)
    for rows, kinds in ((1, Kinds()), (FLAT_ROWS, Kinds()), (1, SIGNS), (FLAT_ROWS, single)):
        found = choose(target, rows, kinds, device)
        assert found.impl == "ring"
        assert found.split(target, 4096, device) == replace(found, impl="flat").split(target, 4096, device) > 1
    found = choose(target, 64, single, device)
    assert (found.impl, found.split(target, 4096, device)) == ("stream", 1)
    assert choose(target, 16, replace(single, columns=True), device).impl == "ring"
    for kinds in (SIGNS, replace(SIGNS, columns=True)):
        found = [choose(target, rows, kinds, device) for rows in (2, 64, 65, 256)]
        assert [(one.impl, one.resident) for one in found] == [("ring", 1), ("ring", 1), ("stream", 1), ("stream", 1)]
        assert found[1].split(target, 4096, device) > 1
    assert choose(target, 16, replace(single, planes=2), device).impl == "flat"
    for shape in ((64, 100), (64, 1001), (64, 17000)):
        assert choose(Target(0, *shape), 16, single, device).impl == "flat"


def test_measured_configurations_come_first(on_h200: Path) -> None:
    target, device = Target(0, 4096, 4096), torch.device("cuda")
    measured = Config("flat", tiles=8)
    on_h200.write_text(json.dumps({key(target, 8, SIGNS): settings(measured)}))
    assert choose(target, 7, SIGNS, device) == ringed(measured, 7, SIGNS)
    assert choose(target, 5, SIGNS, device) == ringed(measured, 5, SIGNS)
    assert choose(target, 8, KINDS["columns"], device) == rule(target, 8, KINDS["columns"], b1=True)
    assert choose(target, 8, Kinds(), device) == ringed(rule(target, 8, Kinds(), b1=True), 8, Kinds())


def test_the_nearest_measured_rows_serve(on_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, else the next larger, else the next smaller; more than FLAT_ROWS take none of fewer rows."""
    target, device = Target(0, 4096, 4096), torch.device("cuda")
    measured = {rows: Config("flat", stages=rows) for rows in (2, 8, FLAT_ROWS)}
    on_h200.write_text(json.dumps({key(target, rows, SIGNS): settings(c) for rows, c in measured.items()}))
    monkeypatch.setattr(choice, "ring_check", lambda device: SelfCheck(False, "off by 1"))
    for rows, nearest in {1: 2, 2: 2, 3: 8, 8: 8, 9: FLAT_ROWS, FLAT_ROWS: FLAT_ROWS}.items():
        assert choose(target, rows, SIGNS, device) == measured[nearest]
    assert choose(target, FLAT_ROWS + 1, SIGNS, device) == rule(target, FLAT_ROWS + 1, SIGNS, b1=True)
    on_h200.write_text(json.dumps({key(target, rows, SIGNS): settings(measured[rows]) for rows in (2, 8)}))
    configs._table.cache_clear()
    assert choose(target, 20, SIGNS, device) == measured[8]


def test_a_chip_that_fails_its_check_unpacks(on_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(0, 4096, 4096)
    on_h200.write_text(json.dumps({key(target, 8, SIGNS): asdict(Config("flat", tiles=8))}))
    monkeypatch.setattr(choice, "self_check", lambda device: SelfCheck(False, "off by 1"))
    assert choose(target, 8, SIGNS, torch.device("cuda")).impl == "unpack"


def test_capabilities() -> None:
    assert [native_b1(c) for c in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        False,
        *[True] * 3,
        False,
        False,
    ]


def test_blocks_of_members() -> None:
    """Members of 7, 3 and 6 tiles in blocks of 2: 4 + 2 + 3."""
    target = Target(0, 250, 300, (0, 112, 160))
    assert member_blocks(target, 250, Kinds(signs=True, columns=True), 2) == (9, 7, 10)
    assert member_blocks(target, 250, SIGNS, 2) == (8, 16, 16)
    assert member_tiles(target, 250) == (7, 10)
    assert member_tiles(Target(0, 250, 300), 250) == (16, 16)


@pytest.mark.parametrize(
    ("outputs", "inputs", "resident"), [(4096, 4096, 2), (12288, 4096, 3), (40, 300, 3), (64, 64, 2)]
)
def test_shares_cover_every_step(outputs: int, inputs: int, resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`split` partials hold what the programs that share a tile leave, whatever does not come out even."""
    monkeypatch.setattr(choice, "multiprocessors", lambda device: 132)
    target, config = Target(0, outputs, inputs), Config("flat", resident=resident)
    tiles, steps = -(-outputs // 64), -(-inputs // 64)
    programs = config.sharing(target, outputs, "cpu")
    whose = [program_of(step, programs, tiles * steps) for step in range(tiles * steps)]
    assert whose == sorted(whose)
    assert set(whose) == set(range(programs))
    shares = [whose.count(program) for program in set(whose)]
    assert max(shares) - min(shares) <= 1
    of_tiles = [set(whose[tile * steps : (tile + 1) * steps]) for tile in range(tiles)]
    assert config.split(target, outputs, "cpu") == max(map(len, of_tiles))
