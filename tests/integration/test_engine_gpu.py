"""On a GPU the engine answers as on a CPU: every kind of variant, loaded and evicted under a small slab."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdelta_core import Engine, EngineConfig, SamplingParams
from tests.integration.engine_zoo import KINDS, Zoo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_same_answers_on_both_devices(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path)
    kinds = [None, *KINDS, "lora"] * 2
    prompts = [tuple(range(40 + i, 50 + 2 * i)) for i in range(len(kinds))]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    answers = []
    for device, slab_bytes in (("cpu", 32 << 20), ("cuda", 32 << 20), ("cuda", 400_000)):
        config = EngineConfig(device=device, dtype="float32", num_kv_blocks=100, slab_bytes=slab_bytes)
        with Engine(zoo.base, config) as engine:
            deltas = [None if kind is None else engine.add_delta(zoo.deltas[kind]) for kind in kinds]
            answers.append([c.token_ids for c in engine.generate(prompts, params, delta=deltas)])
            stats = engine.stats()
        assert (stats.kv_blocks_used, stats.pinned) == (0, ())
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]
