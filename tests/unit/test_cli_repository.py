"""`bitdelta push, pull, ls, alias, rm, gc` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.errors import DeltaFormatError
from deployments.cli import app
from deployments.metadata import context_overrides, metadata_of
from storage import Conflict, CorruptBlob, FileEntry, InvalidName, InvalidSource, Manifest, NotFound

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two deltas of one base, of a single tensor each."""
    root = tmp_path_factory.mktemp("deltas")
    for i in range(3):
        model = root / f"model-{i}"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8, "hidden_size": 8}))
        weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(i))
        tensors = {"model.embed_tokens.weight": torch.ones(8, 8), "model.layers.0.mlp.up_proj.weight": weight}
        save_file(tensors, model / "model.safetensors")
    return [compress(root / "model-0", root / f"model-{i}", root / f"delta-{i}") for i in (1, 2)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on a fresh repository; an error that `main` would print is raised."""
    monkeypatch.setenv("BITDELTA_REPO", str(tmp_path / "repo"))

    def run(*arguments: object, stdin: str = "") -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_push_notes_what_changes_the_context() -> None:
    changes = {"max_position_embeddings": 64, "eos_token_id": 7, "rope_scaling": {"$absent": True}}
    config = DeltaConfig(base_sha256="0" * 64, codec="dense", tensors={}, files={}, config_overrides=changes)
    files = (FileEntry(path="f", sha256="0" * 64, nbytes=1),)
    manifest = Manifest(owner="a", name="b", version=1, files=files, base_sha256="0" * 64, metadata=metadata_of(config))
    assert context_overrides(manifest) == {"max_position_embeddings": 64, "rope_scaling": {"$absent": True}}
    assert context_overrides(replace(manifest, metadata={"context_overrides": [1]})) == {}


def test_push_pull_ls_alias_rm_gc(run: Run, deltas: list[Path], tmp_path: Path) -> None:
    assert run("push", deltas[0], "acme/x", "--alias", "stable").stdout == "acme/x@1\n"
    assert run("push", deltas[1], "acme/x").stdout == "acme/x@2\n"
    assert run("alias", "acme/x@2", "canary").stdout == "acme/x:canary -> acme/x@2\n"

    for name, delta in {"acme/x": 1, "acme/x@1": 0, "acme/x:stable": 0, "acme/x:canary": 1}.items():
        out = tmp_path / name.replace("/", "-")
        assert run("pull", name, out).stdout == f"acme/x@{delta + 1}\n"
        assert files(out) == files(deltas[delta])

    (row,) = json.loads(run("ls", "--json").stdout)
    config = json.loads((deltas[0] / "delta_config.json").read_text())
    assert (row["name"], row["default_version"], row["versions"]) == ("acme/x", 2, [1, 2])
    assert row["aliases"] == {"stable": 1, "canary": 2}
    assert (row["base_sha256"], row["base_model"]) == (config["base_sha256"], config["base_model_name_or_path"])
    assert row["nbytes"] == sum(len(body) for body in files(deltas[1]).values())
    table = run("ls").stdout
    assert "acme/x" in table
    assert "canary=2,stable=1" in table

    with pytest.raises(Conflict):
        run("rm", "acme/x@1", "--yes")
    assert run("rm", "acme/x:stable", "--yes").stdout == "removed acme/x:stable\n"
    assert run("rm", "acme/x@1", stdin="n\n").exit_code == 1
    assert run("rm", "acme/x@1", stdin="y\n").stdout.endswith("removed acme/x@1\n")
    assert run("gc").stdout.startswith("deleted 0 files, 0 B; kept ")
    assert run("gc", "--grace-hours", "0", "--dry-run").stdout.startswith("would delete ")
    assert not run("gc", "--grace-hours", "0").stdout.startswith("deleted 0 ")
    assert run("pull", "acme/x", tmp_path / "after").exit_code == 0
    assert files(tmp_path / "after") == files(deltas[1])


def test_repo_option_wins(run: Run, deltas: list[Path], tmp_path: Path) -> None:
    run("push", deltas[0], "acme/x", "--repo", tmp_path / "other")
    assert not (tmp_path / "repo").exists()
    assert "acme/x" in run("ls", "--repo", f"file://{tmp_path}/other").stdout


def test_the_default_repository(run: Run, monkeypatch: pytest.MonkeyPatch, deltas: list[Path], tmp_path: Path) -> None:
    monkeypatch.delenv("BITDELTA_REPO")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    run("push", deltas[0], "acme/x")
    assert (tmp_path / "data/bitdelta/repo/variants/acme/x/versions/000001.json").is_file()


def test_an_empty_repository(run: Run) -> None:
    result = run("ls")
    assert result.stdout == ""
    assert "no variants in file://" in result.stderr
    assert json.loads(run("ls", "--json").stdout) == []


def test_push_refuses_what_is_no_delta(run: Run, deltas: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"has no delta_config\.json"):
        run("push", tmp_path, "acme/x")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, body in files(deltas[0]).items():
        (broken / name).write_bytes(body[:-1] if name.endswith(".safetensors") else body)
    with pytest.raises(DeltaFormatError):
        run("push", broken, "acme/x")
    rotten = files(deltas[0])["delta.safetensors"]
    (broken / "delta.safetensors").write_bytes(rotten[:-1] + bytes([rotten[-1] ^ 1]))
    with pytest.raises(CorruptBlob, match="has changed since it was made"):
        run("push", broken, "acme/x")
    with pytest.raises(InvalidName):
        run("push", deltas[0], "acme/x", "--alias", "a b")
    with pytest.raises(InvalidName):
        run("push", deltas[0], "acme/x@3")
    assert not (tmp_path / "repo").exists(), "nothing was published"


def test_missing_names(run: Run, tmp_path: Path) -> None:
    for arguments in (["pull", "acme/x", tmp_path / "out"], ["rm", "acme/x", "--yes"], ["alias", "acme/x@1", "stable"]):
        with pytest.raises(NotFound, match="acme/x"):
            run(*arguments)
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_and_help_is_light(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from deployments.cli import main; main()"]
    result = subprocess.run([*command, "ls", "--repo", "ftp://x"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("bitdelta: repository 'ftp://x': unknown scheme")
    assert result.stderr.count("\n") == 1
    code = (
        "import sys, deployments.commands.repository; sys.exit(bool({'torch', 'storage', 'boto3'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
