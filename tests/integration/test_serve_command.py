"""`bitdelta serve` as a user runs it: it says where it listens, and Ctrl-C ends all of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from storage import Catalog, open_store
from tests.integration.serve_harness import Models, wait_for
from tests.ports import free_ports
from tests.tiny import make_base

pytestmark = pytest.mark.ray
COMMAND = [sys.executable, "-m", "deployments.cli", "serve"]


def run(arguments: Sequence[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, expected in [
            ([], "--base: Field required"),
            (["--base", str(tmp_path / "none")], "no base model in"),
            (["--base", str(base), "--port", port], f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            (["--base", str(base), "--port", "0", "--repo", "ftp://x"], "unknown scheme 'ftp'"),
            (["--base", str(base), "--slab-bytes", "many"], "--slab-bytes: "),
        ]:
            found = run(arguments, tmp_path)
            assert found.returncode == 1, found.stderr
            assert found.stderr.startswith("bitdelta: ")
            assert expected in found.stderr
            assert found.stderr.count("\n") == 1


@dataclass
class Command:
    """A running `bitdelta serve`."""

    process: subprocess.Popen[bytes]
    output: Path
    url: str

    def end(self) -> None:
        """As a terminal's Ctrl-C does, which reaches the whole process group. Nothing may be left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        assert children
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(timeout=60) == 0, self.output.read_text()
        assert self.output.read_text().endswith("stopping\n"), self.output.read_text()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []


@contextmanager
def served(models: Models, tmp_path: Path, *options: str) -> Iterator[Command]:
    """`bitdelta serve` once it says that it is ready."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    sizes = ["--slab-bytes", "8MiB", "--kv-cache-bytes", "8MiB"]
    arguments = ["--base", str(models.base), "--repo", str(tmp_path / "repo"), "--port", str(free_ports(1)[0]), *sizes]
    output = tmp_path / "output"
    with output.open("w") as file:
        server = subprocess.Popen(
            [*COMMAND, *arguments, *options],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for("it to be ready", lambda: "ready " in output.read_text() or server.poll() is not None, timeout_s=120)
        url = re.search(r"ready +(http://\S+)/v1", output.read_text())
        assert url, output.read_text()
        yield Command(server, output, url[1])
    finally:
        if server.poll() is None:
            server.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-cpus", "4096"], "1 replicas with 4096 CPUs each, where Ray has"),
        (["--device", "cuda", "--num-gpus", "99"], "1 replicas with 99 GPUs each, where Ray has"),
    ],
)
def test_replicas_that_fit_nowhere_are_refused(tmp_path: Path, options: list[str], said: str) -> None:
    """Ray would wait for ever, and say nothing."""
    found = run(["--base", str(make_base(tmp_path / "base")), "--port", "0", *options], tmp_path)
    assert found.returncode == 1
    assert said in found.stderr


def test_it_serves_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    with served(Models(tmp_path), tmp_path) as command:
        assert f"curl {command.url}/v1/completions" in command.output.read_text()
        answer = httpx.post(f"{command.url}/v1/completions", json={"prompt": "Hello", "max_tokens": 3}, timeout=60)
        assert answer.status_code == 200
        command.end()


def test_direct_streaming(tmp_path: Path) -> None:
    """Replicas answer HTTP themselves: right answers, each delta on one replica, errors, a clean end."""
    models, names = Models(tmp_path), ["acme/a", "acme/b", "acme/c"]
    deltas = {name: models.delta(name, seed=seed) for seed, name in enumerate(names, start=1)}
    catalog = Catalog(open_store(str(tmp_path / "repo")))
    for name, delta in deltas.items():
        catalog.publish(delta, name, base_sha256=models.base_sha256)
    options = ["--direct-streaming", "--host", "0.0.0.0", "--num-replicas", "2", "--num-cpus", "1"]
    with served(models, tmp_path, *options) as command:
        client = openai.OpenAI(base_url=f"{command.url}/v1", api_key="none", max_retries=0, timeout=60)
        wait_for("HAProxy to ask the picker", lambda: all(len(_replicas(command.url, n, 8)) == 1 for n in names))
        asked = names * 4
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda name: _streamed(client, name), asked))
        assert answers == [models.answer(deltas[name], "Hello", 6) for name in asked]
        assert all(len(_replicas(command.url, name, 16)) == 1 for name in names)
        with pytest.raises(openai.NotFoundError):
            _streamed(client, "acme/none")
        command.end()


def _streamed(client: openai.OpenAI, model: str) -> str:
    stream = client.completions.create(model=model, prompt="Hello", max_tokens=6, temperature=0, stream=True)
    return "".join(chunk.choices[0].text for chunk in stream)


def _replicas(url: str, model: str, times: int) -> set[str]:
    """Which replicas answer for a model."""
    body = {"model": model, "prompt": "x", "max_tokens": 1}
    return {httpx.post(f"{url}/v1/completions", json=body, timeout=60).headers["x-replica-id"] for _ in range(times)}


def test_direct_streaming_listens_everywhere_or_not_at_all(tmp_path: Path) -> None:
    found = run(["--base", str(make_base(tmp_path / "base")), "--direct-streaming", "--port", "0"], tmp_path)
    assert found.returncode == 1
    assert "say --host 0.0.0.0" in found.stderr
