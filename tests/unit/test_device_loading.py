"""Weights read piecewise are the checkpoint's; what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.errors import CheckpointError
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device import loading
from bitdelta_core.models.device.loading import load_weights
from bitdelta_core.models.weights import Weights
from tests.tiny import make_base

CPU = torch.device("cpu")


def both(path: Path, dtype: torch.dtype) -> tuple[Weights, Weights]:
    checkpoint = Checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.config)
    return tuple(load(checkpoint, config, device=CPU, dtype=dtype) for load in (load_weights, Weights.read))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_same_as_read(tmp_path: Path, stored: torch.dtype, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PIECE", 1000)  # no tensor's size is a multiple of it
    base = make_base(tmp_path / "base", "qwen3", dtype=stored, tie_word_embeddings=tied, attention_bias=True)
    for dtype in (torch.float32, torch.bfloat16):
        ours, read = both(base, dtype)
        assert torch.equal(ours.vectors_V, read.vectors_V)
        assert ours.targets.keys() == read.targets.keys()
        assert all(torch.equal(ours.targets[name], read.targets[name]) for name in read.targets)
        assert (ours.targets["head"] is ours.targets["embed"]) == tied


def test_shards(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, base / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()
    ours, _ = both(base, torch.float32)
    assert all(torch.equal(out, tensors[name]) for name, out in ours.parts())


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for value, message in ((tensors[name][:-1].clone(), "shape"), (tensors[name].int(), "floating")):
        save_file({**tensors, name: value}, base / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
            load_weights(
                Checkpoint(base), ModelConfig.from_hf(Checkpoint(base).config), device=CPU, dtype=torch.float32
            )


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    checkpoint = Checkpoint(base)
    for name in checkpoint.names:
        checkpoint.location(name)
    file = base / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="ends at byte"):
        load_weights(checkpoint, ModelConfig.from_hf(checkpoint.config), device=CPU, dtype=torch.float32)
