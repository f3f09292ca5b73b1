"""The built wheel, installed outside the clone, is a working `bitdelta` and leaves transformers whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.tiny import make_base, make_finetune

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment that holds our wheel; third-party packages come from the test's own environment.

    A path named in a .pth file is searched, but .pth files inside it are not run: so the development install that is
    registered there in that way stays out.
    """
    home = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = home / "source"
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listing:
        if (ROOT / name).is_file() and not name.startswith(("examples/", "tests/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", home / "dist", source],
        check=True,
        capture_output=True,
    )
    venv.create(home / "env", with_pip=False)
    [site] = (home / "env").glob("lib/python*/site-packages")
    python = home / "env/bin/python"
    wheel = next((home / "dist").glob("*.whl"))
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "env/bin"


def run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_works(installed: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    fine = make_finetune(base, tmp_path / "fine")
    bitdelta = installed / "bitdelta"
    run(bitdelta, "compress", base, fine, tmp_path / "delta", "--distill-steps", "1", cwd=tmp_path)
    report = json.loads(run(bitdelta, "inspect", tmp_path / "delta", "--json", cwd=tmp_path))
    assert report["codec"] == "bitdelta"
    run(bitdelta, "push", tmp_path / "delta", "acme/one", "--repo", tmp_path / "repo", cwd=tmp_path)
    assert "acme/one" in run(bitdelta, "ls", "--repo", tmp_path / "repo", cwd=tmp_path)
    assert "--base" in run(bitdelta, "serve", "--help", cwd=tmp_path)


def test_packages_come_from_the_wheel_with_their_data(installed: Path, tmp_path: Path) -> None:
    code = (
        "import bitdelta_core, deployments, kernels, storage\n"
        "from pathlib import Path\n"
        "for m in (bitdelta_core, deployments, kernels, storage): print(m.__file__)\n"
        "print(sorted(p.name for p in Path(deployments.__file__).parent.glob('*.yaml')))\n"
        "print([p.name for p in Path(bitdelta_core.__file__).parent.rglob('*.txt')])\n"
    )
    *files, yamls, texts = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert all(str(installed.parent) in file for file in files)
    assert "serve.yaml" in yamls
    assert "calibration.txt" in texts


def test_transformers_stays_whole(installed: Path, tmp_path: Path) -> None:
    """transformers probes the import name `kernels`, which is also ours (docs/architecture.md)."""
    code = (
        "import kernels, importlib.metadata as m\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
        "assert 'kernels' not in {d.metadata['Name'] for d in m.distributions()}\n"
        "print(LlamaForCausalLM.__name__)"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path).strip() == "LlamaForCausalLM"
