"""`bitdelta serve` as a user runs it: it says where it listens, and Ctrl-C ends all of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from tests.integration.serve_harness import Models, free_port, wait_for
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


def test_it_serves_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    models, port = Models(tmp_path), free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    sizes = ["--slab-bytes", "8MiB", "--kv-cache-bytes", "8MiB"]
    arguments = ["--base", str(models.base), "--repo", str(tmp_path / "repo"), "--port", str(port), *sizes]
    output = tmp_path / "output"
    with output.open("w") as file:
        server = subprocess.Popen(
            [*COMMAND, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for("it to be ready", lambda: "ready " in output.read_text() or server.poll() is not None, timeout_s=120)
        text = output.read_text()
        url = re.search(r"ready +(http://\S+)/v1", text)
        assert url, text
        assert f"curl {url[1]}/v1/completions" in text
        answer = httpx.post(f"{url[1]}/v1/completions", json={"prompt": "Hello", "max_tokens": 3}, timeout=60)
        assert answer.status_code == 200
        children = psutil.Process(server.pid).children(recursive=True)
        assert children
        os.killpg(server.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole process group
        assert server.wait(timeout=60) == 0, output.read_text()
        assert output.read_text().endswith("stopping\n"), output.read_text()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
    finally:
        if server.poll() is None:
            server.kill()
