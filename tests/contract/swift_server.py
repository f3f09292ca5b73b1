"""A real S3 server from PyPI: OpenStack Swift with its s3api front, one replica, no background daemons.

Swift expects /etc/swift, a supervisor and its own user; here the rings are built in process, the configuration's path
is patched, and the four servers are children of the caller.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.ports import free_ports

ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {root}
devices = {root}/devices
mount_check = false
workers = 0
user = {user}
log_name = {app}
log_level = ERROR
disable_fallocate = true
fallocate_reserve = 0
"""
_BACKEND = (
    _CONF
    + """
[pipeline:main]
pipeline = {app}-server
[app:{app}-server]
use = egg:swift#{app}
"""
)
_PROXY = (
    _CONF
    + """
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth copy slo versioned_writes symlink
    proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
"""
)
_SWIFT = """
[swift-hash]
swift_hash_path_suffix = contract
[storage-policy:0]
name = one
default = yes
[swift-constraints]
max_file_size = 5368709122
"""


@dataclass(frozen=True)
class SwiftServer:
    """Where it listens and what it accepts."""

    endpoint_url: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY


@contextmanager
def running(root: Path) -> Iterator[SwiftServer]:
    """Swift on free ports with its data under `root`, killed at the end (or with the thread that started it)."""
    ports = dict(zip(("proxy", "account", "container", "object"), free_ports(4), strict=True))
    _configure(root, ports)
    with (root / "swift.log").open("wb") as log:
        processes = [_start(root, app, log) for app in ports]
        try:
            _wait_until_healthy(processes, ports["proxy"], root / "swift.log")
            yield SwiftServer(f"http://127.0.0.1:{ports['proxy']}")
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _start(root: Path, app: str, log: BinaryIO) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.contract.swift_server", str(root), app]
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])


def _wait_until_healthy(processes: list[subprocess.Popen[bytes]], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"Swift did not start:\n{log.read_text()[-4000:]}")


def _configure(root: Path, ports: dict[str, int]) -> None:
    import pwd

    from swift.common.ring import RingBuilder

    user = pwd.getpwuid(os.getuid()).pw_name
    (root / "devices" / "d0").mkdir(parents=True)
    (root / "swift.conf").write_text(_SWIFT)
    for app, port in ports.items():
        text = (_PROXY if app == "proxy" else _BACKEND).format(root=root, port=port, app=app, user=user)
        (root / f"{app}.conf").write_text(text)
        if app != "proxy":
            builder = RingBuilder(1, 1, 0)
            builder.add_dev({"region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1", "port": port, "device": "d0"})
            builder.rebalance()
            builder.get_ring().save(str(root / f"{app}.ring.gz"))


def _serve(root: Path, app: str) -> None:
    from swift.common import constraints, utils

    utils.SWIFT_CONF_FILE = str(root / "swift.conf")
    utils.validate_configuration()
    constraints.reload_constraints()
    from swift.common.wsgi import run_wsgi

    # Swift makes each server a session leader, out of reach of a group kill: tie it to its starter instead.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    sys.exit(run_wsgi(str(root / f"{app}.conf"), f"{app}-server"))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
