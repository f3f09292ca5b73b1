"""Frequencies, cos and sin equal transformers', in both spellings of the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bitdelta_core.errors import CheckpointError
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.rope import RopeConfig, cos_sin

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 32},
    "llama3-original-left-out": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-original-left-out": {"rope_type": "yarn", "factor": 4.0},
    "yarn-betas": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.7},
    "yarn-mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn-not-truncated": {"rope_type": "yarn", "factor": 8.0, "truncate": False},
}
BODY = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}


def ours(raw: dict[str, Any], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos_sin((RopeConfig.from_hf(raw, head_dim=16, max_positions=128),), None, positions)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_in_both_spellings(case: str, theta: float) -> None:
    positions = torch.arange(128)
    config = LlamaConfig(**BODY, rope_parameters={**CASES[case], "rope_theta": theta})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    new = {"rope_parameters": {**CASES[case], "rope_theta": theta}}
    old = {"rope_theta": theta, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in CASES[case].items()}}
    for raw in (new, old):
        our_cos, our_sin = ours(raw, positions)
        torch.testing.assert_close(our_cos, cos[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(our_sin, sin[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("position", [127, 128, 200, 255])
def test_dynamic_is_that_of_the_length_so_far(position: int) -> None:
    config = LlamaConfig(**BODY, rope_parameters={**CASES["dynamic"], "rope_theta": 10000.0})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[position]]))
    raw = {"rope_parameters": {**CASES["dynamic"], "rope_theta": 10000.0}}
    for positions in (torch.tensor([position]), torch.arange(256)):
        our_cos, our_sin = ours(raw, positions)
        at = int((positions == position).nonzero())
        torch.testing.assert_close(our_cos[at], cos[0, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(our_sin[at], sin[0, 0], rtol=1e-5, atol=1e-5)


def test_rows_take_their_own_config() -> None:
    configs = tuple(
        RopeConfig.from_hf({"rope_parameters": CASES[c]}, head_dim=16, max_positions=128)
        for c in ("yarn", "dynamic", "default")
    )
    positions, owner = torch.tensor([5, 200, 7, 7, 0]), torch.tensor([0, 1, 1, 2, 0])
    cos, sin = cos_sin(configs, owner, positions)
    for row in range(5):
        alone = cos_sin((configs[int(owner[row])],), None, positions[row : row + 1])
        torch.testing.assert_close((cos[row], sin[row]), (alone[0][0], alone[1][0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -1}, "factor"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "per layer type"),
        ([1], "object"),
    ],
)
def test_refusals_name_the_field(fields: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        RopeConfig.from_hf({"rope_parameters": fields}, head_dim=16, max_positions=128)


GOOD = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "eos_token_id": [5, 7],
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "sliding_window"),
    ],
)
def test_config_refusals_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf({**GOOD, **fields})


def test_overrides_change_what_a_variant_may_change() -> None:
    base = ModelConfig.from_hf(GOOD)
    assert base.eos_token_ids == (5, 7)
    longer = base.with_overrides(
        {
            "max_position_embeddings": 512,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "vocab_size": 103,
            "eos_token_id": {"$absent": True},
        }
    )
    assert (longer.context_len, longer.vocab_size, longer.rope.kind, longer.eos_token_ids) == (512, 103, "linear", ())
    assert longer.with_overrides({"rope_scaling": {"$absent": True}}).rope.kind == "default"
    for refused in ({"num_hidden_layers": 4}, {"head_dim": 8}, {"tie_word_embeddings": True}, {"model_type": "qwen3"}):
        with pytest.raises(CheckpointError, match="config override"):
            base.with_overrides(refused)
