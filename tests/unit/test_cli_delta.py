"""The delta commands, as a user meets them."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from shutil import copytree

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.format import open_delta
from bitdelta_core.errors import BitDeltaError, CheckpointError, InvalidRequest
from deployments import cli
from deployments.cli import app
from deployments.commands.delta import _failed_training
from tests.tiny import make_base, make_finetune


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=1)


@pytest.fixture(scope="module")
def fine(base: Path) -> Path:
    return make_finetune(base, base.parent / "fine", scale=0.2, new_tokens=("<|x|>",))


@pytest.fixture(scope="module")
def delta(base: Path, fine: Path) -> Path:
    out = base.parent / "delta"
    assert run("compress", base, fine, out, "--no-distill", "--scale", "row_col", "--bits", 2).exit_code == 0
    return out


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refusal(*words: object) -> BitDeltaError:
    result = run(*words)
    assert isinstance(result.exception, BitDeltaError), result.output
    return result.exception


def test_compress_obeys_its_flags(base: Path, delta: Path) -> None:
    config = open_delta(delta).config
    signs = [e for e in config.tensors.values() if e.codec == "bitdelta"]
    assert {(e.planes, e.scale_layout) for e in signs} == {(2, "row_col")}
    assert "distillation" not in config.provenance
    assert config.base_model_name_or_path == base.name


def test_compress_distils_by_default_and_names_the_base(base: Path, fine: Path, tmp_path: Path) -> None:
    words = ("--distill-steps", 2, "--distill-batch", 1, "--distill-length", 8, "--base-name", "acme/base")
    text = tmp_path / "text.txt"
    text.write_text("some words of our own " * 9)
    result = run("compress", base, fine, tmp_path / "out", *words, "--revision", "r1", "--calibration", text)
    assert result.exit_code == 0, result.output
    config = open_delta(tmp_path / "out").config
    assert config.provenance["distillation"]["steps"] == 2
    assert config.provenance["distillation"]["calibration"] == "text.txt"
    assert (config.base_model_name_or_path, config.revision) == ("acme/base", "r1")


def test_distillation_that_does_not_help_is_said(base: Path, fine: Path, tmp_path: Path) -> None:
    quick = ("--distill-steps", 2, "--distill-batch", 1, "--distill-length", 8)
    assert "did not lower the loss" in run("compress", base, fine, tmp_path / "a", *quick, "--distill-lr", 1e30).stderr
    assert run("compress", base, fine, tmp_path / "b", *quick).stderr == ""


def test_inspect_says_the_same_to_people_and_programs(delta: Path) -> None:
    facts = json.loads(run("inspect", delta, "--json").output)
    assert facts["nbytes"] == sum(f.stat().st_size for f in delta.iterdir())
    text = run("inspect", delta).output
    assert f"{facts['nbytes']:,} bytes" in text
    assert f"{facts['ratio']:.2f} times smaller" in text
    assert f"{facts['linear_bits_per_weight']:.3f} in the linears" in text


def test_restore_and_verify(base: Path, fine: Path, delta: Path, tmp_path: Path) -> None:
    assert run("restore", base, delta, tmp_path / "back", "--dtype", "bfloat16").exit_code == 0
    assert Checkpoint(tmp_path / "back").config["dtype"] == "bfloat16"
    result = run("verify", base, delta, "--against", fine)
    assert result.exit_code == 0
    assert "sound" in result.output
    assert "model.layers.0.mlp.up_proj.weight" in result.output


def test_a_foreseen_error_is_one_line_on_stderr(
    base: Path, delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_base(tmp_path / "other", seed=3, num_hidden_layers=1)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bitdelta", "verify", str(other), str(delta)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"bitdelta: {delta}: made from the base")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--codec", "lora"), "no PEFT adapter"),
        (("--codec", "dense", "--bits", "2"), "bits"),
        (("--codec", "dense", "--distill"), "distill"),
        (("--codec", "dense", "--distill-steps", "5"), "steps"),
        (("--no-distill", "--distill-lr", "0.1"), "lr"),
        (("--bits", "17", "--no-distill"), "bits"),
    ],
)
def test_flags_without_effect_are_refused(
    base: Path, fine: Path, tmp_path: Path, flags: tuple[str, ...], named: str
) -> None:
    error = refusal("compress", base, fine, tmp_path / "out", *flags)
    assert isinstance(error, InvalidRequest)
    assert named in str(error)


def test_hub_ids_are_explained(fine: Path, tmp_path: Path) -> None:
    assert "hf download" in str(refusal("compress", "meta-llama/Llama-3.2-1B", fine, tmp_path / "out"))


def test_unknown_values_are_usage_errors(base: Path, fine: Path, tmp_path: Path) -> None:
    assert run("compress", base, fine, tmp_path / "out", "--codec", "zip").exit_code == 2


def test_compress_with_dropout_and_with_a_budget(base: Path, fine: Path, tmp_path: Path) -> None:
    words = ("--codec", "deltadq", "--ratio", 64, "--mask-rows", 16, "--group", 8, "--seed", 3)
    result = run("compress", base, fine, tmp_path / "dropped", *words)
    assert result.exit_code == 0, result.output
    assert "64.00 times smaller linears, were only value bits counted" in result.output
    entries = [e for e in open_delta(tmp_path / "dropped").config.tensors.values() if e.codec == "deltadq"]
    assert {(e.alpha, e.bits, e.group, e.mask_rows) for e in entries} == {(8, 2, 8, 16)}
    for name, words, bits in (("auto", (), 1.0), ("less", ("--bits", 0.8, "--no-distill"), 0.8)):
        result = run("compress", base, fine, tmp_path / name, "--codec", "auto", *words)
        assert result.exit_code == 0, result.output
        config = open_delta(tmp_path / name).config
        assert config.provenance["options"]["bits"] == bits
        assert {e.codec for e in config.tensors.values()} == {"dense", "spectral"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--codec", "deltadq", "--ratio", 100), "ratio"),
        (("--codec", "deltadq", "--bits", 2), "bits"),
        (("--codec", "deltadq", "--distill"), "distill"),
        (("--codec", "deltadq", "--max-bytes", 9), "max_bytes"),
        (("--ratio", 64), "ratio"),
        (("--max-bytes", 9), "max_bytes"),
        (("--bits", 1.5), "bits"),
        (("--codec", "auto", "--bits", 1, "--max-bytes", 9), "one of bits"),
        (("--codec", "auto", "--bits", 1, "--scale", "row"), "scale_layout"),
        (("--codec", "auto", "--bits", 1, "--ratio", 64), "ratio"),
        (("--codec", "auto", "--bits", 1, "--no-distill", "--distill-steps", 3), "steps"),
        (("--codec", "auto", "--bits", 1, "--no-distill", "--examples", "x.txt"), "examples"),
        (("--codec", "auto", "--bits", 1, "--distill"), "give --examples"),
        (("--examples", "x.txt"), "trains its scales on --calibration"),
    ],
)
def test_flags_of_other_codecs_are_refused(base: Path, fine: Path, tmp_path: Path, words: tuple, named: str) -> None:
    assert isinstance(error := refusal("compress", base, fine, tmp_path / "d", *words), InvalidRequest)
    assert named in str(error)


def test_what_is_said_of_training_that_came_to_nothing() -> None:
    better = {"kl_untrained": 2.0, "kl_trained": 1.0, "trained_of_budget": 0.9}
    assert _failed_training({}) is _failed_training({"measured": better}) is None
    for measured, named in (
        ({"kl_trained": 2.0}, "did not help"),
        ({"trained_of_budget": 1.1}, "over the budget"),
        ({"untrained_for_want_of_bytes": 3e9}, "3.000 GB"),
    ):
        assert named in (_failed_training({"measured": {**better, **measured}}) or "")
    diverged = {"kl_untrained": 2.0, "trained_of_budget": 0.9}
    assert "did not help" in (_failed_training({"measured": diverged}) or "")
    assert "lower the loss" in (_failed_training({"distillation": {"loss_before": 1.0, "loss_after": 1.0}}) or "")


def test_auto_learns_from_examples_or_says_why_not(base: Path, fine: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "What is written?", "completion": " All that is to be learnt."}\n' * 40)
    words = ("--codec", "auto", "--bits", 0.5, "--distill-length", 48, "--distill-batch", 2, "--examples", asked)
    for steps, lr, complaint in ((60, 0.05, ""), (3, 1e3, "training did not help on the examples held out")):
        result = run(
            "compress", base, fine, tmp_path / f"{steps}", *words, "--distill-steps", steps, "--distill-lr", lr
        )
        assert result.exit_code == 0, result.output
        assert (complaint in result.stderr) if complaint else not result.stderr
    provenance = open_delta(tmp_path / "60").config.provenance
    assert 0.7 < provenance["measured"]["trained_of_budget"] <= 1
    assert provenance["options"]["training"] == {"steps": 60, "batch": 2, "lr": 0.05}
    assert provenance["examples_sha256"] == hashlib.sha256(asked.read_bytes()).hexdigest()
    for text, named in (("{}\n", "asked.jsonl: calibration line 1"), ('{"text": "a b"}\n' * 9, "has 9 examples")):
        asked.write_text(text)
        assert named in str(refusal("compress", base, fine, tmp_path / "refused", *words))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("codec", ["bitdelta", "auto"])
def test_a_fine_tune_that_is_not_finite_is_refused(
    base: Path, fine: Path, tmp_path: Path, name: str, value: float, codec: str
) -> None:
    broken = copytree(fine, tmp_path / "broken")
    change(broken, name, value)
    words = ["--bits", 1.0] if codec == "auto" else ["--no-distill"]
    error = refusal("compress", base, broken, tmp_path / "out", "--codec", codec, *words)
    assert isinstance(error, CheckpointError)
    assert f"tensor {name} of {broken} has a value that is not finite" in str(error)
    assert not (tmp_path / "out").exists()


def test_values_that_no_scale_holds_are_refused(base: Path, fine: Path, tmp_path: Path) -> None:
    """A row's scale has 16 bits."""
    broken = copytree(fine, tmp_path / "broken")
    change(broken, "model.layers.0.self_attn.q_proj.weight", 3e38)
    error = refusal("compress", base, broken, tmp_path / "out", "--no-distill")
    assert "q_proj.weight: its" in str(error)
    assert "not finite" in str(error)


def change(checkpoint: Path, name: str, value: float) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[name][5, 3] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_verify_against_another_vocabulary(base: Path, delta: Path) -> None:
    error = refusal("verify", base, delta, "--against", base)
    assert isinstance(error, InvalidRequest)
    assert "is [258, 48], the delta's is [259, 48]" in str(error)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_of_auto_are_checked(base: Path, fine: Path, tmp_path: Path, seed: int) -> None:
    assert "seed must be" in str(
        refusal("compress", base, fine, tmp_path / "o", "--codec", "auto", "--bits", 1, "--seed", seed)
    )


def test_a_path_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def denied() -> None:
        raise PermissionError(13, "Permission denied", "/secret/base")

    monkeypatch.setattr(cli, "app", denied)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "bitdelta: /secret/base: Permission denied\n"


@pytest.mark.parametrize("port", [-1, 65536, 99999999])
def test_ports_that_do_not_exist(base: Path, port: int) -> None:
    assert run("serve", "--base", base, "--port", port).exit_code == 2
