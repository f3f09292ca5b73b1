"""PEFT adapters taken as they are: equal to what PEFT itself computes; what is not plain LoRA is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import open_for, restore
from bitdelta_core.errors import CheckpointError, InvalidRequest
from tests.tiny import make_base

IDS = torch.tensor([[256, 72, 105, 33, 10, 65]])
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, path: Path, **config: Any) -> torch.Tensor:
    """A random adapter; returns PEFT's own logits."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "target_modules": PROJECTIONS, **config}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter) + 0.02 * ("lora_B" in name))
    wrapped.save_pretrained(path)
    with torch.no_grad():
        return wrapped.eval()(input_ids=IDS).logits


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_rslora": True, "lora_alpha": 5}, id="rslora"),
        pytest.param({"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}}, id="patterns"),
        pytest.param({"bias": "all"}, id="bias"),
        pytest.param({"modules_to_save": ["lm_head"]}, id="head"),
        pytest.param({"modules_to_save": ["embed_tokens", "lm_head", "norm"]}, id="whole-modules"),
        pytest.param({"target_modules": [*PROJECTIONS, "lm_head"]}, id="lora-on-head"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_mean_what_peft_means(config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    family = "qwen2" if config.get("bias") else "llama"
    base = make_base(tmp_path / "base", family, tie_word_embeddings=tied)
    want = make_adapter(base, tmp_path / "adapter", **config)
    delta = open_for(Checkpoint(base), compress(base, tmp_path / "adapter", tmp_path / "delta"))
    assert delta.config.codec == "lora"
    assert (want - logits(base)).norm() > 0.01 * want.norm()
    torch.testing.assert_close(logits(restore(base, delta.path, tmp_path / "back")), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"r": 7}, "rank"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    make_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=named):
        compress(base, tmp_path / "adapter", tmp_path / "delta")


def test_adapters_of_another_shape_and_on_embeddings_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    make_adapter(base, tmp_path / "adapter")
    other = make_base(tmp_path / "other", num_hidden_layers=1, intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj"):
        compress(other, tmp_path / "adapter", tmp_path / "delta")
    make_adapter(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    wider = make_base(tmp_path / "wider", num_hidden_layers=1, hidden_size=64, head_dim=16)
    with pytest.raises(CheckpointError, match=r"q_proj|norm|lm_head"):
        compress(wider, tmp_path / "whole", tmp_path / "delta")
    file = tmp_path / "whole" / "adapter_model.safetensors"
    tensors = load_file(file)
    norm = next(key for key in tensors if key.endswith("norm.weight"))
    save_file({**tensors, norm: torch.ones(49)}, file)
    with pytest.raises(CheckpointError, match=r"norm\.weight.*49"):
        compress(base, tmp_path / "whole", tmp_path / "delta")
    make_adapter(base, tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="lora_embedding"):
        compress(base, tmp_path / "embedding", tmp_path / "delta")


def test_options_do_not_apply_to_adapters(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    make_adapter(base, tmp_path / "adapter")
    with pytest.raises(InvalidRequest, match="taken as it is"):
        compress(base, tmp_path / "adapter", tmp_path / "delta", CompressOptions())
