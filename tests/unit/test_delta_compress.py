"""Compressing whole fine-tunes: what is stored, what survives, what is refused, interruption, memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.delta.inspect import summarise
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import open_for, restore
from bitdelta_core.delta.verify import compare, verify
from bitdelta_core.errors import BaseMismatch, CheckpointError, InvalidRequest
from tests.tiny import FAMILIES, make_base, make_finetune

IDS = torch.tensor([[256, 72, 105, 33, 10, 65]])
EXACT = CompressOptions(codec="dense", embeddings="exact")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def fine(base: Path) -> Path:
    return make_finetune(base, base.parent / "fine")


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def opened(base: Path, delta: Path) -> DeltaReader:
    return open_for(Checkpoint(base), delta)


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or with None drop) tensors of a checkpoint; `__` in a keyword stands for a dot."""
    tensors = load_file(path / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_codecs_give_the_very_fine_tune_back(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family, dtype=torch.bfloat16)
    fine = make_finetune(base, tmp_path / "fine", new_tokens=("<|x|>", "<|y|>"))
    delta = compress(base, fine, tmp_path / "delta", EXACT)
    back = restore(base, delta, tmp_path / "back")
    want, got = Checkpoint(fine), Checkpoint(back)
    assert got.names == want.names
    assert all(got.get(n).dtype == want.get(n).dtype and torch.equal(got.get(n), want.get(n)) for n in want.names)
    assert torch.equal(logits(back), logits(fine))
    assert {f.name for f in back.iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert all(error.relative_error == 0 for error in compare(base, delta, fine))


@pytest.mark.parametrize("family", FAMILIES)
def test_sign_codec_comes_closer_to_the_fine_tune_than_the_base(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    fine = make_finetune(base, tmp_path / "fine")
    want = logits(fine)
    errors = [(logits(base) - want).norm()]
    for bits in (1, 4):
        delta = compress(base, fine, tmp_path / f"delta{bits}", CompressOptions(bits=bits, scale_layout="row_col"))
        verify(base, delta)
        errors.append((logits(restore(base, delta, tmp_path / f"back{bits}")) - want).norm())
    assert errors[1] < 0.85 * errors[0]
    assert errors[2] < 0.35 * errors[0]


def test_what_equals_the_base_is_not_stored(base: Path, tmp_path: Path) -> None:
    fine = make_finetune(base, tmp_path / "fine", only="layers.1.mlp")
    delta = opened(base, compress(base, fine, tmp_path / "delta"))
    assert set(delta.config.tensors) == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("down", "gate", "up")}
    assert delta.config.config_overrides == {}
    assert delta.config.tokenizer_files == ()
    nothing = opened(base, compress(base, base, tmp_path / "nothing"))
    assert not nothing.config.tensors
    assert torch.equal(logits(restore(base, nothing.path, tmp_path / "back")), logits(base))


def test_few_changed_rows_are_stored_as_rows_and_many_as_four_bits(base: Path, fine: Path, tmp_path: Path) -> None:
    few = make_finetune(base, tmp_path / "few", only="norm", new_tokens=("<|x|>",))
    entries = opened(base, compress(base, few, tmp_path / "a")).config.tensors
    assert {entries[n].codec for n in ("model.embed_tokens.weight", "lm_head.weight")} == {"rows"}
    assert entries["lm_head.weight"].rows == 1
    many = opened(base, compress(base, fine, tmp_path / "b")).config.tensors["lm_head.weight"]
    assert (many.codec, many.bits, many.rows) == ("quant", 4, 258)
    for name, bits in (("int2", 2), ("int8", 8)):
        options = CompressOptions(embeddings=name)  # pyright: ignore[reportArgumentType]
        assert (
            opened(base, compress(base, fine, tmp_path / name, options)).config.tensors["lm_head.weight"].bits == bits
        )
    exact = opened(base, compress(base, fine, tmp_path / "c", CompressOptions(embeddings="exact")))
    assert exact.config.tensors["lm_head.weight"].codec == "dense"


def test_config_overrides_say_what_changed_and_what_is_gone(base: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    fine = make_finetune(base, tmp_path / "fine", config={"rope_parameters": scaling, "max_position_embeddings": 1024})
    config = json.loads((fine / "config.json").read_text())
    del config["initializer_range"]
    (fine / "config.json").write_text(json.dumps(config))
    delta = opened(base, compress(base, fine, tmp_path / "delta", EXACT))
    assert delta.config.config_overrides == {
        "initializer_range": {"$absent": True},
        "max_position_embeddings": 1024,
        "rope_parameters": scaling,
    }
    merged = delta.config.merged_config(Checkpoint(base).config)
    assert {k: v for k, v in merged.items() if k != "dtype"} == {k: v for k, v in config.items() if k != "dtype"}
    assert torch.equal(logits(restore(base, delta.path, tmp_path / "back")), logits(fine))


@pytest.mark.parametrize("base_tied", [True, False])
@pytest.mark.parametrize("fine_tied", [True, False])
@pytest.mark.parametrize("grown", [0, 2])
def test_heads_tied_and_untied(base_tied: bool, fine_tied: bool, grown: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=base_tied)
    tokens = tuple(f"<|{i}|>" for i in range(grown))
    fine = make_finetune(base, tmp_path / "fine", new_tokens=tokens, config={"tie_word_embeddings": fine_tied})
    embedding = load_file(fine / "model.safetensors")["model.embed_tokens.weight"]
    own = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(3)) * embedding.std()
    rewrite(fine, lm_head__weight=None if fine_tied else own)
    delta = opened(base, compress(base, fine, tmp_path / "delta", EXACT))
    assert ("lm_head.weight" in delta.config.tensors) is not (base_tied and fine_tied)
    back = restore(base, delta.path, tmp_path / "back")
    torch.testing.assert_close(logits(back), logits(fine))
    lossy = compress(base, fine, tmp_path / "lossy", CompressOptions(bits=4, embeddings="int8"))
    assert (logits(restore(base, lossy, tmp_path / "back8")) - logits(fine)).norm() < 0.25 * logits(fine).norm()


def test_untying_without_a_change_stores_no_head(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    fine = make_finetune(base, tmp_path / "fine", only="embed", config={"tie_word_embeddings": False})
    rewrite(fine, lm_head__weight=load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone())
    delta = opened(base, compress(base, fine, tmp_path / "delta", EXACT))
    assert set(delta.config.tensors) == {"model.embed_tokens.weight"}
    assert delta.config.config_overrides == {"tie_word_embeddings": False}
    assert torch.equal(logits(restore(base, delta.path, tmp_path / "back")), logits(fine))


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({"model_type": "mistral"}, {}, "model_type"),
        ({"num_key_value_heads": 4}, {}, "num_key_value_heads"),
        ({}, {"model__norm__weight": None}, "model.norm.weight"),
        ({}, {"model__extra__weight": torch.ones(3)}, "model.extra.weight"),
        ({}, {"model__norm__weight": torch.ones(49)}, "model.norm.weight"),
        ({}, {"model__norm__weight": torch.ones(48, dtype=torch.float64)}, "float64"),
        ({"vocab_size": 300}, {}, "vocab_size"),
    ],
)
def test_what_is_no_fine_tune_is_refused_by_name(
    base: Path, tmp_path: Path, config: dict[str, object], tensors: dict[str, torch.Tensor | None], named: str
) -> None:
    fine = make_finetune(base, tmp_path / "fine", config=config)
    rewrite(fine, **tensors)
    with pytest.raises(CheckpointError, match=named):
        compress(base, fine, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    assert not (tmp_path / "delta.partial").exists()


def test_another_base_is_refused_everywhere(base: Path, fine: Path, tmp_path: Path) -> None:
    delta = compress(base, fine, tmp_path / "delta")
    other = make_base(tmp_path / "other", seed=9)
    for refuse in (verify, lambda b, d: restore(b, d, tmp_path / "back")):
        with pytest.raises(BaseMismatch):
            refuse(other, delta)
    assert not (tmp_path / "back").exists()


def test_out_must_not_exist_and_base_must_be_here(base: Path, fine: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="exists already"):
        compress(base, fine, tmp_path)
    with pytest.raises(CheckpointError, match="hf download"):
        compress(Path("meta-llama/Llama"), fine, tmp_path / "delta")
    with pytest.raises(InvalidRequest, match="bits"):
        compress(base, fine, tmp_path / "delta", CompressOptions(bits=0))


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("config.json", "[]", "config.json: expected a JSON object"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("model.safetensors.index.json", "[]", "expected a JSON object"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}', "outside its directory"),
    ],
)
def test_checkpoints_that_are_malformed_are_named(base: Path, tmp_path: Path, file: str, text: str, named: str) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / file).write_text(text)
    with pytest.raises(CheckpointError, match=named):
        compress(base, broken, tmp_path / "delta")


def test_pickled_weights_are_not_read(base: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle, which is not read"):
        compress(base, pickled, tmp_path / "delta")


def test_an_output_that_cannot_be_written_is_named(base: Path, fine: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    delta = compress(base, fine, tmp_path / "delta")
    for write in (lambda: compress(base, fine, out), lambda: restore(base, delta, out)):
        with pytest.raises(InvalidRequest, match=f"{out} cannot be written: Not a directory"):
            write()


def test_a_full_disk_is_named_and_the_run_resumes(
    base: Path, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(InvalidRequest, match="cannot be written: No space left on device"):
            compress(base, fine, tmp_path / "delta")
    assert verify(base, compress(base, fine, tmp_path / "delta")).nbytes


def test_shards_hold_the_same_as_one_file(base: Path, fine: Path, tmp_path: Path) -> None:
    one = opened(base, compress(base, fine, tmp_path / "one"))
    many = opened(base, compress(base, fine, tmp_path / "many", shard_bytes=5000))
    assert len(many.config.weight_files) > 3
    assert (many.path / "delta.safetensors.index.json").is_file()
    for entry in one.config.tensors.values():
        assert all(torch.equal(one.part(entry, p), many.part(entry, p)) for p in entry.parts())
    whole = restore(base, many.path, tmp_path / "whole")
    pieces = restore(base, many.path, tmp_path / "pieces", shard_bytes=20000)
    assert len(list(pieces.glob("*.safetensors"))) > 3
    assert torch.equal(logits(whole), logits(pieces))


def test_sizes_count_every_byte(base: Path, tmp_path: Path) -> None:
    fine = make_finetune(base, tmp_path / "fine", new_tokens=("<|x|>",))
    delta = opened(base, compress(base, fine, tmp_path / "delta"))
    summary = summarise(delta)
    assert summary.nbytes == sum(f.stat().st_size for f in delta.path.iterdir())
    assert sum(summary.bytes_by_kind.values()) == summary.nbytes
    assert all(size >= 0 for size in summary.bytes_by_kind.values())
    assert summary.finetune_bytes_16bit == Checkpoint(fine).nbytes_16bit
    assert summary.ratio == pytest.approx(Checkpoint(fine).nbytes_16bit / summary.nbytes)
    linears = [e for e in delta.config.tensors.values() if e.codec == "bitdelta"]
    assert summary.linear_bits_per_weight is not None
    assert 1.0 < summary.linear_bits_per_weight < 1.0 + 16 * len(linears)


def test_dtype_of_what_is_stored_whole(base: Path, fine: Path, tmp_path: Path) -> None:
    options = CompressOptions(embeddings="exact", dtype="bfloat16")
    delta = opened(base, compress(base, fine, tmp_path / "delta", options))
    norm = delta.config.tensors["model.norm.weight"]
    assert delta.part(norm, "value").dtype == torch.bfloat16
    assert delta.nbytes < opened(base, compress(base, fine, tmp_path / "b", CompressOptions(embeddings="exact"))).nbytes
    back = Checkpoint(restore(base, delta.path, tmp_path / "back", dtype=torch.float16))
    assert {back.get(name).dtype for name in back.names} == {torch.float16}
    assert back.config["dtype"] == "float16"


KILL = """
import os, sys
from pathlib import Path
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.writer import DeltaWriter
left = int(sys.argv[4])
put = DeltaWriter.put
def counting(self, entry, parts):
    global left
    left -= 1
    if left < 0:
        self._write(entry.part_name(next(iter(parts))), next(iter(parts.values())))  # half of one parameter
        os._exit(9)
    put(self, entry, parts)
DeltaWriter.put = counting
compress(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), shard_bytes=9000)
"""


def test_a_killed_run_resumes_to_the_same_bytes(
    base: Path, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(base, fine, tmp_path / "whole", shard_bytes=9000)
    killed = subprocess.run([sys.executable, "-c", KILL, base, fine, tmp_path / "resumed", "7"], check=False)
    assert killed.returncode == 9
    assert not (tmp_path / "resumed").exists()
    encoded: list[str] = []
    from bitdelta_core.delta import planning

    encode = planning.encode
    monkeypatch.setattr(planning, "encode", lambda e, b, f: encoded.append(e.name) or encode(e, b, f))
    resumed = compress(base, fine, tmp_path / "resumed", shard_bytes=9000)
    assert len(encoded) == len(open_delta(whole).config.tensors) - 7
    assert {f.name: f.read_bytes() for f in resumed.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    assert not (tmp_path / "resumed.partial").exists()


def test_leftovers_of_other_work_are_not_taken_over(base: Path, fine: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILL, base, fine, tmp_path / "delta", "7"], check=False)
    other = make_finetune(base, tmp_path / "other", seed=5)
    delta = compress(base, other, tmp_path / "delta", shard_bytes=9000)
    fresh = compress(base, other, tmp_path / "fresh", shard_bytes=9000)
    assert {f.name: f.read_bytes() for f in delta.iterdir()} == {f.name: f.read_bytes() for f in fresh.iterdir()}


def test_a_torn_journal_line_is_done_again(base: Path, fine: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILL, base, fine, tmp_path / "delta", "7"], check=False)
    journal = tmp_path / "delta.partial" / "journal"
    journal.write_text(journal.read_text()[:-4])
    delta = compress(base, fine, tmp_path / "delta", shard_bytes=9000)
    verify(base, delta)


def test_one_variant_is_never_restored_with_anothers_weights(base: Path, fine: Path, tmp_path: Path) -> None:
    """Swap the weight files of two sound deltas of one base: the hashes give it away."""
    other = make_finetune(base, tmp_path / "other", seed=7)
    mine, theirs = compress(base, fine, tmp_path / "mine"), compress(base, other, tmp_path / "theirs")
    shutil.copyfile(theirs / "delta.safetensors", mine / "delta.safetensors")
    with pytest.raises(Exception, match="sha256"):
        verify(base, mine)
