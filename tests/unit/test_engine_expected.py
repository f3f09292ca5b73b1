"""What an engine prepares for when nobody says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.format import open_delta
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.expected import MOST, UsualDelta
from bitdelta_core.engine.loading import LoadedBase
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.layout import DeviceLayout
from tests.tiny import make_base, make_finetune


def test_it_is_what_compress_writes_by_default(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", intermediate_size=96)
    fine = make_finetune(base, tmp_path / "fine")
    model = ModelConfig.from_hf(Checkpoint(base).config)
    written = open_delta(compress(base, fine, tmp_path / "delta", CompressOptions())).config
    expected = UsualDelta.of(model)
    for name, entry in expected.tensors.items():
        found = written.tensors[name]
        assert (found.codec, found.planes, found.scale_layout, found.bits) == (
            entry.codec,
            entry.planes,
            entry.scale_layout,
            entry.bits,
        )
    kinds = [DeviceLayout.plan(delta, model, torch.bfloat16).kinds for delta in (written, expected)]
    assert kinds[0] == kinds[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DeltaConfig]]:
    """A base, and a default delta and one of two planes with one scale each."""
    work = tmp_path_factory.mktemp("published")
    base = make_base(work / "base", intermediate_size=96)
    fine = make_finetune(base, work / "fine")
    options = [CompressOptions(), CompressOptions(bits=2, scale_layout="tensor")]
    deltas = [compress(base, fine, work / f"delta-{i}", one) for i, one in enumerate(options)]
    return base, [open_delta(delta).config for delta in deltas]


def expected_kinds(
    base: Path, published: Callable[[str], Sequence[DeltaConfig]] | None, *, eager: bool = False
) -> list[object]:
    """Of what an engine prepares for. On a CPU the interpreter stands for a GPU."""
    config = EngineConfig(device="cpu", decoder="device", enforce_eager=eager, kv_cache_bytes=1 << 22)
    loaded = LoadedBase(base, config, None)
    try:
        return [layout.kinds for layout in loaded.expected(config, published)]  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        loaded.loader.close()


def test_what_is_published_comes_first(made: tuple[Path, list[DeltaConfig]]) -> None:
    base, (usual, other) = made
    asked: list[str] = []

    def published(base_sha256: str) -> list[DeltaConfig]:
        asked.append(base_sha256)
        return [other, usual, usual]

    found = expected_kinds(base, published)
    assert asked == [Checkpoint(base).sha256()]
    assert len(found) == MOST == 2
    assert found[0] != found[1]
    assert found[1:] == expected_kinds(base, None)


def test_the_usual_where_nothing_published_helps(
    made: tuple[Path, list[DeltaConfig]], caplog: pytest.LogCaptureFixture
) -> None:
    base, (_, other) = made
    name, entry = next((n, e) for n, e in other.tensors.items() if e.codec == "bitdelta")
    misfit = replace(other, tensors={**other.tensors, name: replace(entry, shape=(3, 5))})
    default = expected_kinds(base, None)
    assert expected_kinds(base, lambda sha256: []) == default
    assert expected_kinds(base, lambda sha256: [misfit]) == default
    assert name in caplog.text
    assert expected_kinds(base, lambda sha256: pytest.fail("asked"), eager=True) == default
