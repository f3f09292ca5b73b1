"""A decode step is as many launches as planned: each costs microseconds, and a layer's are repeated in every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from bitdelta_core.models.device.step import StepBuffers, StepSize
from tests.tiny import make_base
from tests.unit.device_stepper import DEVICE, Rig, pretend_b1
from tests.unit.models_harness import base_state
from tests.unit.test_models_variants import random_delta

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts the interpreter's launches")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (None, 8),  # norm, qkv, attention with rope, o, norm, gate and up, SiLU, down
        ("sign", 10),  # and the planes of what attention and SiLU give
        ("dropout-1", 12),  # kept values for each linear; they gather from x itself
        ("lora", 16),  # two for each linear, and a zeroing that is torch's; no planes
    ],
)
def test_launches_of_a_layer(tmp_path: Path, kind: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_b1(monkeypatch)
    launched: list[object] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: launched.append(self.fn))
    counts = []
    for layers in (1, 2):
        base = make_base(tmp_path / str(layers), intermediate_size=96, num_hidden_layers=layers)
        rig = Rig(base)
        if kind is not None:
            rig.add(0, random_delta(base_state(base), 3, kind, None, tied=False))
        rows, kv = StepBuffers(StepSize.decode(4, 4), DEVICE).rows, rig.decoder.new_kv_cache(2, 8)
        launched.clear()
        rig.decoder.decode(rows, torch.zeros(4, dtype=torch.int32), kv, rig.tables.kinds)
        counts.append(len(launched))
    assert counts[1] - counts[0] == expected
