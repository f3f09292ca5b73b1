"""Logits equal transformers' for every family, rope variant, window, bias and head, however the prompt is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitdelta_core.models.decoder import Decoder
from tests.tiny import FAMILIES, make_base
from tests.unit.models_harness import Running, Stepper

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha-derived-head-dim": ("llama", {"num_key_value_heads": 4, "head_dim": None, "hidden_size": 56}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-no-window-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2-windows-from-layer-1": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-bias-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
CHUNKS = ((37,), (1,), (5, 11, 1, 1, 3))


def check(path: Path, family: str, config: dict[str, Any]) -> None:
    base = make_base(path / "base", family, **config)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    decoder = Decoder.load(base)
    tokens = torch.randint(0, 256, (37,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    for chunks in CHUNKS:
        (logits,) = Stepper(decoder, {}).run([Running(-1, tokens.tolist())], chunks)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_and_rope(tmp_path: Path, family: str, rope: str) -> None:
    check(tmp_path, family, {"rope_parameters": ROPES[rope]})


@pytest.mark.parametrize("case", SHAPES)
def test_architecture(tmp_path: Path, case: str) -> None:
    check(tmp_path, *SHAPES[case])


def test_dynamic_rope_growing_past_its_context_equals_generation(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", max_position_embeddings=16, rope_parameters=ROPES["dynamic"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.randint(0, 256, (31,), generator=torch.Generator().manual_seed(4))
    expected, cache = [], None
    with torch.no_grad():
        for part in (tokens[:12], *tokens[12:].split(1)):
            out = model(part[None], past_key_values=cache, use_cache=True)
            expected.append(out.logits[0])
            cache = out.past_key_values
    decoder = Decoder.load(base)
    assert decoder.config.context_len == 32
    (cut,) = Stepper(decoder, {}).run([Running(-1, tokens.tolist())], (12, *[1] * 19))
    torch.testing.assert_close(cut, torch.cat(expected), rtol=1e-4, atol=2e-5)
    (whole,) = Stepper(decoder, {}).run([Running(-1, tokens.tolist())], (31,))
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    tokens = torch.randint(0, 256, (37,), generator=torch.Generator().manual_seed(3)).tolist()
    exact, near = (
        Stepper(Decoder.load(base, dtype=dtype), {}).run([Running(-1, tokens)], (9, 1))[0]
        for dtype in (torch.float32, None)
    )
    assert Decoder.load(base).dtype == torch.bfloat16
    assert (near - exact).norm() < 0.03 * exact.norm()
