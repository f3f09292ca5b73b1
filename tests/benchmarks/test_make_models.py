"""The tiny models are made, and the fidelity benchmark runs on them, both as they are run by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fidelity_examples import write_examples
from make_models_tasks import PAIRS, chat, evaluation, largest, practice
from make_models_train import answers, likelihood, preference, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str, *args: Any) -> str:
    command = [sys.executable, BENCHMARKS / name, *map(str, args), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    script("make_models.py", "--tiny", "--out", out, "--only", "chat", "long", "dpo", "dates-lora")
    return out


@pytest.mark.slow
def test_models_are_checkpoints_that_transformers_loads(models: Path) -> None:
    base, grown = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("base", "chat"))
    assert base.dtype == torch.bfloat16
    assert grown.config.vocab_size == base.config.vocab_size + 3
    tokenizer: Any = AutoTokenizer.from_pretrained(models / "chat")
    assert len(tokenizer("<|user|>").input_ids) == 1
    assert len(AutoTokenizer.from_pretrained(models / "base")("2048", add_special_tokens=False).input_ids) == 4
    long = json.loads((models / "long" / "config.json").read_text())
    assert long["rope_parameters"]["factor"] == 4
    assert long["max_position_embeddings"] == 4 * base.config.max_position_embeddings
    assert (models / "dates-lora" / "adapter_config.json").is_file()
    assert set(json.loads((models / "eval.json").read_text())) == {*PAIRS, "chat"}


@pytest.mark.slow
def test_what_is_there_is_not_made_again(models: Path) -> None:
    before = (models / "dpo" / "model.safetensors").stat().st_mtime_ns
    assert script("make_models.py", "--tiny", "--out", models, "--only", "dpo") == ""
    assert (models / "dpo" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_benchmark_runs_on_them(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    codecs = ["dense", "bitdelta", "low-rank", "delta-come", "dare", "magnitude", "whole"]
    limits = ["--prompts", 4, "--answers", 4, "--windows", 1, "--seeds", 2, "--budgets", 2, "--distill-steps", 1]
    chosen = ["--finetunes", "chat", "dates-lora", "--codecs", *codecs, "--base-bits", "4", "gptq4"]
    script("fidelity.py", "--models", models, *limits, *chosen, "--out", out, "--commit", "c", "--threads", 1)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["seed"] for record in records} == {0, 1}
    of_chat = {json.dumps(r["way"]): r for r in records if r["finetune"] == "chat" and r["seed"] == 1}
    exact = of_chat['{"codec": "dense"}']
    assert exact["score"]["kl"] == pytest.approx(0, abs=1e-6)
    assert exact["gain_kept"] == pytest.approx(1)
    for codec in ("low-rank", "dare", "magnitude"):
        got = of_chat[json.dumps({"codec": codec, "budget": 2.0})]
        assert 1.5 < got["linear_bits_per_weight"] < 2.2
        assert got["score"]["kl"] > 0
        assert of_chat[json.dumps({"codec": codec, "budget": 2.0, "base": "int4"})]["score"] != got["score"]
    assert not any(r["way"]["codec"] == "whole" and "base" in r["way"] for r in records)
    adapter = [r["way"] for r in records if r["finetune"] == "dates-lora"]
    assert {"codec": "lora"} in adapter
    assert not any(way.get("distill") for way in adapter)
    assert str(models) not in out.read_text(), "results say where things lay"


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_tasks_have_one_answer(name: str) -> None:
    rng = random.Random(0)
    drawn = [PAIRS[name](rng) for _ in range(300)]
    assert len({prompt for prompt, _ in drawn}) == len(dict(drawn)) > 100
    assert all(dict(drawn)[prompt] == answer for prompt, answer in drawn)
    assert all(answer.startswith(" ") and not prompt.endswith(" ") for prompt, answer in drawn)


def test_preferences_and_conversations() -> None:
    rng = random.Random(0)
    for prompt, right, wrong in (largest(rng) for _ in range(50)):
        numbers = [int(word) for word in prompt.split("\n")[0].split()[1:]]
        assert int(right) == max(numbers) > int(wrong)
        assert int(wrong) in numbers
    assert all(row["messages"][0]["role"] == "user" and row["answer"] for row in (chat(rng) for _ in range(20)))
    assert evaluation(20) == evaluation(20) != evaluation(20, seed=2)


def test_nothing_is_trained_on_that_is_judged(tmp_path: Path) -> None:
    judged = evaluation(300)
    found = practice(300, judged)
    assert found.keys() == judged.keys()
    assert all(
        not {json.dumps(row) for row in found[name]} & {json.dumps(row) for row in judged[name]} for name in found
    )
    assert len(found["sort"]) > 250
    args = SimpleNamespace(eval=tmp_path / "eval.json")
    rows = [["p0", "a0"], {"messages": [{"role": "user", "content": "p1"}], "answer": "a1"}, "text 2", ["p3", "a3"]]
    kept = read(write_examples(args, "sort", rows, [3], tmp_path / "out.jsonl"))  # pyright: ignore[reportArgumentType]
    assert kept[0] == {"prompt": "p0", "completion": "a0"}
    assert kept[1]["messages"][1] == {"role": "assistant", "content": "a1"}
    assert kept[2:] == [{"text": "text 2"}]
    (tmp_path / "examples.json").write_text(json.dumps({"sort": [["p9", "a9"]]}))
    others = read(write_examples(args, "sort", rows, [3], tmp_path / "out.jsonl"))  # pyright: ignore[reportArgumentType]
    assert others == [{"prompt": "p9", "completion": "a9"}]


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def small() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def test_training_learns_the_answers() -> None:
    """What follows 3 n is n + 1; prompts are not learnt."""
    samples = [([0, 3, n], [n + 1, 1]) for n in range(4, 30)] * 40
    model = small()
    batches = list(answers(samples, 208, "cpu"))
    assert len(batches[0].places) == 2 * len(batches[0].ids), "each row has two tokens to learn"
    before = likelihood(model, batches[0]).item()
    assert train(model, batches, len(batches), 1e-2, likelihood, 0.0) < 0.3 * before


def test_preferences_are_learnt_against_a_reference() -> None:
    model, reference = small(), small().eval().requires_grad_(False)
    pairs = [
        tuple(next(answers([([0, 3, n], [word]) for n in range(4, 20)], 4096, "cpu")) for word in (20, 21))
        for _ in range(30)
    ]
    loss = preference(reference)
    at_first = loss(model, pairs[0]).item()
    train(model, pairs, 30, 1e-2, loss, 0.0)
    chosen, rejected = (likelihood(model, batch).item() for batch in pairs[0])
    assert loss(model, pairs[0]).item() < at_first
    assert chosen + 1 < rejected
