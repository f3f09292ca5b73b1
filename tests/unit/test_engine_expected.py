"""What an engine prepares for when nobody says."""

from __future__ import annotations

from pathlib import Path

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.format import open_delta
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.engine.expected import UsualDelta
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
