"""Tables say what was published, and what nobody published computes NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.kinds import StepKinds
from bitdelta_core.models.device.layout import DeviceLayout, empty_rows
from bitdelta_core.models.device.tables import DeltaTables
from bitdelta_core.models.rope import inv_freq
from kernels.device import NONE, UNIT, Field, Kinds
from tests.tiny import BASE_CONFIG
from tests.unit.models_harness import FakeDelta

CONFIG = ModelConfig.from_hf({"model_type": "llama", **BASE_CONFIG, "intermediate_size": 96})
SLOTS = 3


def tables() -> DeltaTables:
    vectors_V = torch.arange(5 * 48, dtype=torch.float32)
    slab = torch.full((1 << 20,), 255, dtype=torch.uint8)
    return DeltaTables(CONFIG, vectors_V, slab, 2 * UNIT, SLOTS)


def layout(seed: int, **overrides: object) -> DeviceLayout:
    gen = torch.Generator().manual_seed(seed)
    delta = FakeDelta(config_overrides=overrides)
    base = {"model.embed_tokens.weight": torch.randn(258, 48), "model.norm.weight": torch.ones(48)}
    base["model.layers.0.mlp.up_proj.weight"] = torch.randn(96, 48)
    delta.add(base, "model.layers.0.mlp.up_proj.weight", gen, codec="bitdelta", planes=seed)
    if seed > 1:
        delta.add(base, "model.norm.weight", gen, codec="dense")
    return DeviceLayout.plan(delta, CONFIG, torch.float32)


def vectors(made: DeltaTables, entry: int) -> torch.Tensor:
    at = int(made.deltas.vectors_E[entry]) * UNIT
    return made.deltas.slab[at : at + 5 * 48 * 4].view(torch.float32)


def test_the_base_has_its_vectors_and_no_parts() -> None:
    made = tables()
    made.check_integrity()
    assert torch.equal(vectors(made, 0), torch.arange(5 * 48, dtype=torch.float32))
    assert torch.equal(made.deltas.table_EJF[0], empty_rows(10))
    assert made.vocab_E.tolist() == [258, 0, 0, 0]
    assert torch.equal(made.rope.values_EF[0, :8], inv_freq(CONFIG.rope, torch.device("cpu")))
    assert made.kinds == StepKinds()
    assert DeltaTables.base_bytes(torch.empty(5 * 48)) == 2 * 1024


def test_what_nobody_published_is_nan() -> None:
    made = tables()
    made.publish(1, layout(2), 8192)
    made.clear(1)
    for entry in (1, 2, 3):
        assert vectors(made, entry).isnan().all()
        assert made.rope.values_EF[entry].isnan().all()
        assert torch.equal(made.deltas.table_EJF[entry], empty_rows(10))
    made.check_integrity()


def test_publish_moves_every_offset_to_the_extent() -> None:
    made, planned = tables(), layout(2, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    made.publish(2, planned, 40 * UNIT)
    made.check_integrity()
    here, at_zero = made.deltas.table_EJF[3], planned.row(0)
    assert torch.equal(here, planned.row(40 * UNIT))
    sign = here[2, Field.SIGN]
    assert int(sign) == int(at_zero[2, Field.SIGN]) + 40
    assert int(here[2, Field.COL]) == NONE
    assert int(made.deltas.vectors_E[3]) == planned.vectors_at(40 * UNIT)
    assert made.rope.values_EF[3, 0] == 0.5
    assert made.vocab_E[3] == 258


def test_a_variant_without_vectors_has_the_bases() -> None:
    made = tables()
    made.publish(0, layout(1), 8192)
    assert int(made.deltas.vectors_E[1]) == int(made.deltas.vectors_E[0])


def test_kinds_are_those_of_the_residents() -> None:
    made = tables()
    made.publish(0, layout(1), 8192)
    made.publish(2, layout(3), 32768)
    assert made.kinds == StepKinds(Kinds(signs=True, planes=3))
    made.clear(2)
    assert made.kinds == StepKinds(Kinds(signs=True))


def test_integrity_notices_what_was_overwritten() -> None:
    for damage in ("table_EJF", "vectors_E"):
        made = tables()
        made.publish(0, layout(1), 8192)
        getattr(made.deltas, damage)[1] += 1
        with pytest.raises(AssertionError, match="overwritten"):
            made.check_integrity()
    made = tables()
    made.vocab_E[0] = 3
    with pytest.raises(AssertionError, match="overwritten"):
        made.check_integrity()


def test_slots_are_published_once_and_cleared_once(tmp_path: Path) -> None:
    made = tables()
    made.publish(0, layout(1), 8192)
    with pytest.raises(AssertionError, match="published twice"):
        made.publish(0, layout(1), 8192)
    made.clear(0)
    with pytest.raises(AssertionError, match="nothing is published"):
        made.clear(0)
    with pytest.raises(AssertionError, match="beyond the slab"):
        made.publish(0, layout(1), 1 << 20)
