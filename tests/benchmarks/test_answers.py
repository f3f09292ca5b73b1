"""benchmarks/answers.py finds an engine faithful, and one that confuses two variants not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import answers
import pytest

from bitdelta_core import Engine
from tests.tiny import make_base, make_finetune


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base", num_hidden_layers=1)
    for seed, name in enumerate(("sums", "notes"), 1):
        make_finetune(base, root / name, seed=seed, scale=0.5)
    (root / "eval.json").write_text(json.dumps({"sums": [[f"{i} + {i} =", f" {2 * i}"] for i in range(6)]}))
    (root / "valid.json").write_text(json.dumps(["Not much happens here.", "Nor here."]))
    return root


def run(models: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    words = ["--codecs", "bitdelta", "--distill-steps", "0", "--longest", "64", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["answers.py", "--models", str(models), *words, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        answers.main()
    return int(str(ended.value.code))


def test_an_engine_says_what_the_restored_checkpoints_say(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(models, tmp_path / "out.jsonl", monkeypatch) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["finetune"] for line in lines] == ["notes", "sums"]
    assert all(line["off"] < 1e-3 and line["engine"]["nats"] > 0.1 for line in lines)
    assert lines[1]["engine"].keys() == {"nats", "exact_match", "written"}


def test_two_variants_confused_are_found(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, first = Engine.add_delta, []

    def confused(self: Engine, path: Path) -> str:
        first.append(own(self, path))
        return first[0]

    monkeypatch.setattr(Engine, "add_delta", confused)
    assert run(models, tmp_path / "out.jsonl", monkeypatch) == 1
