"""Tiny random checkpoints of every supported family, and random fine-tunes of them: what most tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BASE_CONFIG: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 258,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def make_tokenizer(path: Path, *, extra: tuple[str, ...] = (), chat_template: str | None = None) -> None:
    """A byte-level tokenizer (ids 0..255 are the bytes, 256 `<s>`, 257 `</s>`), plus `extra` special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(extra)
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)


def make_base(
    path: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A random checkpoint of one family. `config` overrides BASE_CONFIG."""
    torch.manual_seed(seed)
    hf = AutoConfig.for_model(family, **{**BASE_CONFIG, **config})
    model = AutoModelForCausalLM.from_config(hf).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases away from their trivial initial values
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name or "lm_head" in name:
                parameter.mul_(10)
            else:
                parameter.mul_(4)
    model.save_pretrained(path)
    make_tokenizer(path)
    return path


def make_finetune(
    base: Path,
    path: Path,
    *,
    seed: int = 1,
    scale: float = 0.02,
    only: str | None = None,
    new_tokens: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> Path:
    """A random fine-tune: noise on each tensor whose name contains `only` (all: None), more vocabulary, overrides."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for file in sorted(base.glob("*.safetensors")):
        tensors.update(load_file(file))
    body = json.loads((base / "config.json").read_text()) | (config or {})
    for name, tensor in tensors.items():
        if only is None or only in name:
            noise = torch.randn(tensor.shape, generator=generator) * scale * tensor.float().std()
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        if new_tokens and ("embed_tokens" in name or "lm_head" in name):
            rows = torch.randn(len(new_tokens), tensor.shape[1], generator=generator) * tensor.float().std()
            tensors[name] = torch.cat([tensors[name], rows.to(tensor.dtype)])
    body["vocab_size"] += len(new_tokens)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(body))
    make_tokenizer(path, extra=new_tokens, chat_template=CHAT_TEMPLATE if new_tokens else None)
    return path
