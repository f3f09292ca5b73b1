"""Base logits of the device decoder equal transformers' for every family: chunks through `prefill`, rows through
`decode`. More combinations: `test_models_families.py`, of the decoder that this one is compared with elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device import layout
from bitdelta_core.models.device.decoder import DeviceDecoder
from bitdelta_core.models.device.step import StepBuffers, StepSize
from tests.tiny import BASE_CONFIG, make_base
from tests.unit.device_stepper import BLOCKS, DEVICE, DeviceStepper, Rig, Running, error

SMALL = {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-mha-yarn": (
        "llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 16, "rope_parameters": YARN},
    ),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2-windows-from-layer-1": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": DYNAMIC},
    ),
    "qwen3-bias-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True)
def few_extra_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "EXTRA_TOKENS", 6)


@pytest.mark.parametrize("case", CASES)
def test_family(tmp_path: Path, case: str) -> None:
    family, config = CASES[case]
    base = make_base(tmp_path / "base", family, **SMALL | config)
    tokens = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        expected = model(torch.tensor([tokens])).logits[0]
    (logits,) = DeviceStepper(Rig(base)).run([Running(-1, tokens)], (6, 1, 4, 1))
    assert (logits[:, 258:] == -torch.inf).all()
    off = error(logits[:, :258], expected)
    assert off < (1e-4 if DEVICE.type == "cpu" else 0.05), f"off by {off:.1e} of rms"


def test_supports_says_what_does_not_fit() -> None:
    def why(dtype: torch.dtype = torch.float32, **config: Any) -> str | None:
        body = {"model_type": "llama", **BASE_CONFIG, "intermediate_size": 96, **config}
        return DeviceDecoder.supports(ModelConfig.from_hf(body), dtype, torch.device("cpu"))

    assert why() is None
    assert "no multiple of 8" in str(why(head_dim=12))
    assert "no multiple of 8" in str(why(head_dim=264))
    assert "40 outputs of k and v" in str(why(head_dim=8, num_key_value_heads=5, num_attention_heads=10))
    assert "inputs are more than" in str(why(intermediate_size=65552))


def test_working_memory_is_what_was_planned(tmp_path: Path) -> None:
    """Every size up to the reserved ones fits, with any kinds; one more does not."""
    rig = Rig(make_base(tmp_path / "base", **SMALL | {"num_hidden_layers": 1}))
    decoder = rig.decoder
    decoder.reserve(2, 0)
    assert decoder.work_bytes(2, 0) > decoder.work.numel()
    assert decoder.work_bytes(2, 30) > decoder.work_bytes(2, 0)
    kv, sampled = decoder.new_kv_cache(BLOCKS, 8), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for rows in (1, 2):
        decoder.decode(StepBuffers(StepSize.decode(rows, 4), DEVICE).rows, sampled, kv, rig.tables.kinds)
    with pytest.raises(AssertionError, match="planned for less"):
        decoder.decode(StepBuffers(StepSize.decode(64, 4), DEVICE).rows, sampled, kv, rig.tables.kinds)


def test_few_layers_keep_one_of_each_kind(tmp_path: Path) -> None:
    """What compiles for these has compiled for all: the first adds nothing to its residual, and windows differ."""
    many = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "num_hidden_layers": 5}
    decoder = Rig(make_base(tmp_path / "base", "qwen2", **SMALL | many)).decoder
    every = list(decoder._layers)
    with decoder.few_layers():
        assert [id(layer) for layer in decoder._layers] == [id(layer) for layer in every[:3]]
    assert [id(layer) for layer in decoder._layers] == [id(layer) for layer in every]
