"""Calibrating a model layer by layer gives what calibrating it whole gives, and holds one layer at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import auto, sensitivity, streaming
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.calibration import Batches
from bitdelta_core.delta.format import EMBEDDING, HEAD, open_delta
from bitdelta_core.delta.pairing import parameters
from bitdelta_core.delta.restore import restore
from bitdelta_core.delta.streaming import Streamed
from bitdelta_core.delta.verify import compare
from bitdelta_core.errors import InvalidRequest
from tests.tiny import make_base, make_finetune

CPU = torch.device("cpu")
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "rope": ("llama", {"rope_scaling": {**ROPE, "original_max_position_embeddings": 16}}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2, later layers see four tokens": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "mistral, five tokens": ("mistral", {"sliding_window": 5}),
}  # fmt: skip
COUNT = 19
"""Batches: the last that go together are fewer."""


def texts() -> Batches:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 24, (40,), generator=generator).tolist()
    return Batches([torch.randint(1, 250, (n,), generator=generator).tolist() for n in lengths], 2, seed=3)


def matrices(checkpoint: Checkpoint) -> list[str]:
    return [name for name in parameters(checkpoint) if len(checkpoint.shape(name)) == 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_moments(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_KEPT", torch.float32)
    name, fields = FAMILIES[family]
    checkpoint = Checkpoint(make_base(tmp_path / "base", name, num_hidden_layers=3, **fields))
    names = matrices(checkpoint)
    wanted = dict(sensitivity.measure(sensitivity.load_model(checkpoint, CPU), names, texts(), COUNT))
    found = list(Streamed(checkpoint, CPU).measure(names, texts(), COUNT))
    assert sorted(name for name, _ in found) == sorted(names)
    for name, sides in found:
        for own, other in zip(sides, wanted[name], strict=True):
            assert own.moment is not None
            assert other.moment is not None
            assert (own.moment - other.moment).norm() < 1e-5 * other.moment.norm(), name


def test_only_what_is_asked_for_and_no_further_down_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(make_base(tmp_path / "base", num_hidden_layers=3))
    read: list[int] = []
    own = Streamed._weights

    def noted(self: Streamed, index: int) -> dict[str, torch.Tensor]:
        read.append(index)
        return own(self, index)

    monkeypatch.setattr(Streamed, "_weights", noted)
    chosen = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    assert {name for name, _ in Streamed(checkpoint, CPU).measure(chosen, texts(), COUNT)} == set(chosen)
    assert read == [0, 1, 2, 2, 1]
    read.clear()
    assert [name for name, _ in Streamed(checkpoint, CPU).measure([HEAD], texts(), COUNT)] == [HEAD]
    assert read == [0, 1, 2]
    assert [name for name, _ in Streamed(checkpoint, CPU).measure([EMBEDDING], texts(), COUNT)] == [EMBEDDING]


def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(make_base(tmp_path / "base", num_hidden_layers=4))
    before: list[weakref.ref[torch.Tensor]] = []
    own = Streamed._weights

    def noted(self: Streamed, index: int) -> dict[str, torch.Tensor]:
        gc.collect()
        assert not any(ref() is not None for ref in before), "the layer before is still in memory"
        weights = own(self, index)
        before[:] = [weakref.ref(weight) for weight in weights.values()]
        return weights

    monkeypatch.setattr(Streamed, "_weights", noted)
    assert len(dict(Streamed(checkpoint, CPU).measure(matrices(checkpoint), texts(), COUNT))) == 4 * 7 + 2
    assert len(before) == 9


def test_compressing_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the fine-tune as with room for everything and the same scales, and refused where it cannot be done."""
    monkeypatch.setattr(auto, "_POWERS", (auto._UNSEEN_POWER,))
    base = make_base(tmp_path / "base", num_hidden_layers=2)
    fine = make_finetune(base, tmp_path / "fine", scale=0.3, new_tokens=("<|x|>",))
    errors = []
    for room in (True, False):
        monkeypatch.setattr(sensitivity, "has_room", lambda fine, device, models, room=room: room)
        options = AutoOptions(bits=1.0, texts=8, length=32)
        delta = auto.compress(base, fine, tmp_path / f"delta {room}", options)
        restore(base, delta, tmp_path / f"restored {room}")
        errors.append(sum(e.relative_error for e in compare(base, delta, fine)))
        assert open_delta(delta).config.tensors[EMBEDDING].codec == "spectral"
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    with pytest.raises(InvalidRequest, match=r"twice in memory.*bits or max_bytes"):
        auto.compress(base, fine, tmp_path / "none", AutoOptions(min_fidelity=0.9))
