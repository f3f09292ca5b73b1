"""The whole engine over the device decoder, its kernels emulated on a CPU: the same tokens as the torch decoder."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path

import pytest
import torch

from bitdelta_core import Engine, EngineConfig, SamplingParams
from bitdelta_core.engine.config import DecoderName
from bitdelta_core.errors import InvalidRequest
from bitdelta_core.models.device import layout
from tests.engine.engine_zoo import Zoo
from tests.tiny import make_base

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_engine_gpu.py has the real kernels")
SMALL = {"intermediate_size": 48, "hidden_size": 40, "num_hidden_layers": 1}
KINDS = ("bitdelta-row", None, "lora")


def config(decoder: DecoderName, **given: object) -> EngineConfig:
    limits = {"num_kv_blocks": 12, "slab_bytes": 8 << 20, "max_num_seqs": 3, "max_num_batched_tokens": 8, **given}
    return EngineConfig(device="cpu", dtype="float32", decoder=decoder, max_resident_variants=2, **limits)  # pyright: ignore[reportArgumentType]


def test_same_answers_as_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "EXTRA_TOKENS", 6)
    zoo = Zoo(tmp_path, config=SMALL)
    prompts = [(40, 41, 42), (50, 51, 52, 53), (60,)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, repetition_penalty=1.3, logprobs=1)
    answers = []
    for decoder in ("torch", "device"):
        given = {"cuda_graph_deltas": (str(zoo.deltas["lora"]),)}
        with Engine(zoo.base, config(decoder, **given)) as engine:
            assert (decoder == "device") == ("device kernels" in engine.memory.table())
            deltas = [None if kind is None else engine.add_delta(zoo.deltas[kind]) for kind in KINDS]
            answers.append(engine.generate(prompts, params, delta=deltas))
            stats = engine.stats()
        assert (stats.kv_blocks_used, stats.pinned) == (0, ())
    for ours, theirs in zip(*answers, strict=True):
        assert ours.token_ids == theirs.token_ids
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.chosen.logprob == pytest.approx(b.chosen.logprob, abs=1e-3)
            assert a.chosen.rank == b.chosen.rank
            assert [t.token_id for t in a.top] == [t.token_id for t in b.top]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"max_num_seqs": 300, "max_num_batched_tokens": 300}, "at most 256"),
        ({"block_size": 12}, "no power of two"),
        ({}, "88 outputs of gate"),
    ],
)
def test_what_the_device_decoder_does_not_support_is_told(tmp_path: Path, given: dict[str, int], why: str) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    with pytest.raises(InvalidRequest, match=why):
        Engine(base, config("device", **given))


@pytest.mark.parametrize("decoder", ["torch", "device"])
def test_a_closed_engine_lets_go_of_weights_slab_and_cache(tmp_path: Path, decoder: DecoderName) -> None:
    """Though somebody still holds it."""
    base = make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=96)
    with Engine(base, config(decoder)) as engine:
        held = (
            engine._base.weights.vectors_V,
            engine._base.backend,
            engine._thread._core,
            engine._thread._core._runner,
        )
        parts = [weakref.ref(part) for part in held]
        del held
    assert [part() for part in parts] == [None] * 4
    assert engine.stats().running == 0


def test_without_a_gpu_torch_serves_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    with caplog.at_level(logging.INFO), Engine(base, config("auto")) as engine:
        assert engine.memory.decoder == "torch (no GPU)"
    assert "torch (no GPU)" in caplog.text
