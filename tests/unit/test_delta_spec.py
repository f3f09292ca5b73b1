"""Another implementation, written from docs/delta-format.md with numpy alone, reads what ours writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.dropout import DropoutOptions
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import restore
from tests.tiny import make_base, make_finetune
from tests.unit.by_the_book import kept_columns

DTYPES = {"U8": np.uint8, "I32": np.int32, "F16": np.float16, "F32": np.float32}
Arrays = dict[str, np.ndarray]


def read_safetensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, fields in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in fields["data_offsets"])
            yield name, np.frombuffer(raw[begin:end], DTYPES[fields["dtype"]]).reshape(fields["shape"])


def signs(packed: np.ndarray, k: int) -> np.ndarray:
    bits = (packed[..., :, None] >> np.arange(8)) & 1
    return np.where(bits.reshape(*packed.shape[:-1], -1)[..., :k] == 1, 1.0, -1.0)


def codes(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    at = np.arange(k) * bits
    return (packed[:, at // 8] >> (at % 8)) & (2**bits - 1)


def decode(entry: dict[str, Any], parts: Arrays, base: np.ndarray) -> np.ndarray:
    match entry["codec"]:
        case "dense":
            return parts["value"]
        case "rows":
            fine = np.zeros(entry["shape"])
            common = min(len(base), len(fine))
            fine[:common] = base[:common]
            fine[parts["index"]] = parts["value"]
            return fine
        case "quant":
            q = codes(parts["q"].astype(np.int64), entry["bits"], base.shape[1]) - 2 ** (entry["bits"] - 1)
            return np.concatenate([base[: entry["rows"]] + q * parts["scale"][:, None], parts["extra"]])
        case "deltadq":
            return base + dropped(entry, parts)
        case _:
            fine = base.astype(np.float64)
            for p in range(entry.get("planes", 1)):
                plane = signs(parts["sign"][p], base.shape[1]) * parts["scale"][p]
                plane = plane * parts["row"][p][:, None].astype(float) if "row" in parts else plane
                fine = fine + (plane * parts["col"][p].astype(float) if "col" in parts else plane)
            return fine


def dropped(entry: dict[str, Any], parts: Arrays) -> np.ndarray:
    (n, k), group = entry["shape"], entry["group"]
    whole = np.zeros((n, -(-k // group) * group))
    for row in range(n):
        columns = kept_columns(row, k, group, entry["alpha"], entry["mask_rows"], entry["seed"])
        levels = codes(parts["code"][row : row + 1].astype(np.int64), entry["bits"], len(columns))[0]
        whole[row, columns] = (levels - (2 ** entry["bits"] - 1) / 2) * parts["scale"][0]
        whole[row] *= float(parts["row"][row]) if "row" in parts else 1
    return whole[:, :k]


def untie(fine: Path) -> None:
    """Give a fine-tune of a tied base a head of its own."""
    tensors = load_file(fine / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, fine / "model.safetensors")
    body = json.loads((fine / "config.json").read_text())
    (fine / "config.json").write_text(json.dumps(body | {"tie_word_embeddings": False}))


@pytest.mark.parametrize(
    "options",
    [
        CompressOptions(scale_layout="tensor"),
        CompressOptions(scale_layout="row", bits=2, embeddings="int2"),
        CompressOptions(scale_layout="row_col", bits=3, embeddings="int8"),
        CompressOptions(codec="dense"),
        CompressOptions(codec="deltadq", dropout=DropoutOptions(alpha=2, group=16, mask_rows=16, seed=3)),
        CompressOptions(codec="deltadq", dropout=DropoutOptions(alpha=8, value_bits=4, group=8, scale="tensor")),
    ],
    ids=["tensor", "row", "row_col", "dense", "dropout", "dropout-tensor"],
)
@pytest.mark.parametrize("head", ["untied", "tied", "untied by the fine-tune"])
def test_the_page_is_enough_to_read_a_delta(options: CompressOptions, head: str, tmp_path: Path) -> None:
    tied = head != "untied"
    base = make_base(tmp_path / "base", num_hidden_layers=1, intermediate_size=42, tie_word_embeddings=tied)
    fine = make_finetune(base, tmp_path / "fine", new_tokens=("<|x|>",))
    if head == "untied by the fine-tune":
        untie(fine)
    delta = compress(base, fine, tmp_path / "delta", options, shard_bytes=9000)
    config = json.loads((delta / "delta_config.json").read_text())
    assert config["format_version"] == (2 if options.codec == "deltadq" else 1)
    parts = {n: t for f in config["files"] if f.endswith(".safetensors") for n, t in read_safetensors(delta / f)}
    weights = dict(read_safetensors(base / "model.safetensors"))
    back = Checkpoint(restore(base, delta, tmp_path / "back"))
    assert config["tensors"]
    assert ("lm_head.weight" in config["tensors"]) == (head != "tied")
    for name, entry in config["tensors"].items():
        own = {part.removeprefix(f"{name}."): t for part, t in parts.items() if part.rpartition(".")[0] == name}
        mine = decode(entry, own, weights.get(name, weights["model.embed_tokens.weight"]))
        np.testing.assert_allclose(mine, back.get(name).numpy(), rtol=1e-5, atol=1e-6)
    for name in set(weights) - set(config["tensors"]):
        np.testing.assert_array_equal(weights[name], back.get(name).numpy())
