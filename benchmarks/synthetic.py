"""Checkpoints and deltas of random numbers in the shapes of well-known models: what speed is measured on.

Speed does not depend on the values, as long as they are neither zeros nor NaN. What answers are worth is measured on
trained models (`fidelity.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.spec import ScaleLayout, TensorEntry
from bitdelta_core.delta.spectral import Coded, parts_of
from bitdelta_core.delta.writer import write
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.parameters import EMBED, HEAD, Parameters

Kind = Literal["tensor", "row", "row_col", "lora", "dense", "auto"]
AUTO_SHARE = 16
"""auto: one of so many components. It keeps about that at an eighth of a bit (docs/delta-format.md)"""
NO_BASE = "0" * 64
"""The hash of weights that are in no file."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one dense Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_theta: float = 10000.0

    def config(self) -> dict[str, Any]:
        """config.json"""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def model(self) -> ModelConfig:
        return ModelConfig.from_hf(self.config())


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, 131072, 500000.0),
    "small": Shape(512, 1536, 4, 8, 4, 4096, 4096),
    "tiny": Shape(64, 256, 2, 4, 2, 320, 512),
}


def write_base(shape: Shape, out: Path, *, seed: int = 0, layers_per_file: int = 4) -> Path:
    """A Hugging Face checkpoint in bfloat16, sharded. Made on the GPU where there is one, several files at a time.

    It appears whole: what a run that was stopped has left is made anew.
    """
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(shape.config(), indent=1))
    _write_tokenizer(work, shape.vocabulary)
    files: dict[str, list[str]] = {}
    parameters = Parameters.of(shape.model())
    for name in (*parameters.linears, *parameters.vectors):
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        files.setdefault(f"model-{layer // layers_per_file + 1:02d}.safetensors", []).append(name)

    def write_file(item: tuple[int, tuple[str, list[str]]]) -> None:
        index, (file, names) = item
        generator = torch.Generator(device()).manual_seed(seed * 1000 + index)
        save_file({n: _values(parameters, n, generator) for n in names}, work / file, metadata={"format": "pt"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_file, enumerate(files.items())))
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (work / "model.safetensors.index.json").write_text(json.dumps(index))
    work.rename(out)
    return out


def device() -> torch.device:
    """Where random numbers are made."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _values(parameters: Parameters, name: str, generator: torch.Generator) -> torch.Tensor:
    if (span := parameters.vectors.get(name)) is not None:
        return torch.ones(span.stop - span.start, dtype=torch.bfloat16)
    place = parameters.linears[name]
    values = torch.randn(place.rows, place.columns, generator=generator, device=generator.device)
    return (values / math.sqrt(place.columns)).to(torch.bfloat16).cpu()  # to 16 bits before it goes over the bus


def _write_tokenizer(out: Path, size: int) -> None:
    """Bytes, `<s>` and `</s>`; every other id has a text too, so that no token passes unseen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {char: i + 3 for i, char in enumerate(alphabet)}
    vocabulary |= {f"~{i}": i for i in range(len(vocabulary), size)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(out)


def entries(
    config: ModelConfig, kind: Kind, *, planes: int = 1, rank: int = 16, head_bits: int = 4
) -> list[TensorEntry]:
    """A delta that changes every linear; signs come with an int4 embedding and head, as a full fine-tune's."""
    found = []
    for name, place in Parameters.of(config).linears.items():
        shape = (place.rows, place.columns)
        if kind == "auto":
            share = max(1, min(shape) // AUTO_SHARE)
            found.append(
                TensorEntry(name=name, shape=shape, codec="spectral", rank=share, rows=place.rows, code_bytes=1)
            )
        elif name in (EMBED, HEAD):
            if kind not in ("lora", "dense"):
                found.append(TensorEntry(name=name, shape=shape, codec="quant", bits=head_bits, rows=place.rows))
        elif kind == "lora":
            found.append(TensorEntry(name=name, shape=shape, codec="lora", rank=rank, scaling=1.0))
        elif kind == "dense":
            found.append(TensorEntry(name=name, shape=shape, codec="dense"))
        else:
            layout: ScaleLayout = kind
            found.append(TensorEntry(name=name, shape=shape, codec="bitdelta", planes=planes, scale_layout=layout))
    return found


def random_part(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random bits for packed values, small numbers for scales and factors; made on the generator's device."""
    where = generator.device
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=where).cpu()
    return (torch.rand(shape, generator=generator, device=where) * 0.01 + 0.001).to(dtype).cpu()


def _codes(found: Sequence[TensorEntry], generator: torch.Generator) -> dict[str, dict[str, torch.Tensor]]:
    """Of components that are spread from 3 steps down to 0.4. All matrices of one shape have the same."""

    def coded(entry: TensorEntry) -> Coded:
        steps_r = torch.linspace(3, 0.4, entry.rank, device=generator.device)[:, None]
        a, b = (
            (torch.randn(entry.rank, n, generator=generator, device=generator.device) * steps_r).round().char()
            for n in (entry.shape[1], entry.rows)
        )
        return Coded(a, b, 1e-3, torch.zeros(entry.rank, dtype=torch.uint8, device=generator.device))

    first = {(e.rank, e.shape[1], e.rows): e for e in found}
    parts = dict(zip(first, parts_of([coded(e) for e in first.values()], generator.device), strict=True))
    return {e.name: parts[e.rank, e.shape[1], e.rows] for e in found}


def write_delta(
    base: Path | ModelConfig, out: Path, kind: Kind, *, seed: int = 0, planes: int = 1, rank: int = 16
) -> Path:
    """A delta of random numbers for a checkpoint; or for a model of which there are no files, with NO_BASE's hash."""
    model, sha256, name = base, NO_BASE, ""
    if isinstance(base, Path):
        checkpoint = Checkpoint(base)
        model, sha256, name = ModelConfig.from_hf(checkpoint.config), checkpoint.sha256(), base.name
    assert isinstance(model, ModelConfig)
    found = sorted(entries(model, kind, planes=planes, rank=rank), key=lambda e: e.name)
    generator = torch.Generator(device()).manual_seed(seed)
    codes = _codes(found, generator) if kind == "auto" else {}
    found = [replace(e, code_bytes=codes[e.name]["code"].numel()) if e.name in codes else e for e in found]
    config = DeltaConfig(
        base_sha256=sha256,
        codec=kind if kind in ("lora", "dense", "auto") else "bitdelta",
        tensors={entry.name: entry for entry in found},
        files={},
        base_model_name_or_path=name,
    )
    parts = (
        (
            e,
            {
                part: codes[e.name][part] if part in codes.get(e.name, {}) else random_part(dtype, shape, generator)
                for part, (dtype, shape) in e.parts().items()
            },
        )
        for e in found
    )
    return write(out, config, parts, sidecars={})
