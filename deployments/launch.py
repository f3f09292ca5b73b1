"""`bitdelta serve`: check what can be checked, bring Ray and the application up, say where it listens, end cleanly."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from types import FrameType

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from bitdelta_core.errors import BitDeltaError, CheckpointError, InvalidRequest
from deployments.client import APP
from deployments.config import AppConfig
from storage import Catalog, open_store, repository_uri

POLL_S = 0.2
EVERYWHERE = ("0.0.0.0", "::")
OBJECT_STORE_BYTES = 100 * 2**20
"""Deltas and tokens do not travel through Ray's object store."""


class LaunchFailed(BitDeltaError):
    """The application did not come up."""

    code = "launch_failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listen:
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    """Of a running Ray cluster, or `auto`. None: a Ray of our own, which ends with us."""
    verbose: bool = False

    @property
    def url(self) -> str:
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '') else self.host}:{self.port}"


def run(config: AppConfig, listen: Listen, say: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        CheckpointError: no base there.
        InvalidRequest: the port is taken.
        StorageError: the repository cannot be reached.
        LaunchFailed: Ray or the application did not come up.
    """
    stop = threading.Event()
    config = config.absolute()
    with _signals_set(stop):
        variants = check(config, listen)
        say(f"base        {config.base_name}  ({config.base})")
        say(f"repository  {repository_uri(config.repo)}  ({variants} variants)")
        with ExitStack() as end, _ray(config, listen), _application(config, listen, stop):
            if not stop.is_set():
                say(banner(config, listen))
            stop.wait()
            say("stopping")
            end.enter_context(_hushed(listen))  # without a gap between the two endings


def check(config: AppConfig, listen: Listen) -> int:
    """Fail early, and say why, where Ray would fail late. Returns how many variants the repository has."""
    if not (config.base / "config.json").is_file():
        raise CheckpointError(f"no base model in {config.base}: expected a directory with config.json and safetensors")
    if config.direct_streaming and listen.host not in EVERYWHERE:
        raise InvalidRequest(
            f"direct streaming listens on every address of this machine, not only on {listen.host}: say --host 0.0.0.0 "
            "if that is meant, with --api-key where others can reach it",
            param="host",
        )
    if listen.address is None:
        _check_port(listen)
    return len(Catalog(open_store(repository_uri(config.repo))).list())


def banner(config: AppConfig, listen: Listen) -> str:
    """Where it listens, and what to try."""
    body = json.dumps({"model": config.base_name, "prompt": "Once upon a time", "max_tokens": 16})
    auth = " -H 'Authorization: Bearer YOUR_KEY'" if config.keys() else ""
    return (
        f"\nready       {listen.url}/v1\n\n"
        f"  curl {listen.url}/v1/models{auth}\n"
        f"  curl {listen.url}/v1/completions{auth} -H 'Content-Type: application/json' \\\n    -d '{body}'\n\n"
        "Ctrl-C ends it."
    )


def _check_port(listen: Listen) -> None:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen.host, listen.port))
        except OSError as error:
            raise InvalidRequest(
                f"cannot listen on {listen.host}:{listen.port}: {error.strerror}; choose another --port or --host",
                param="port",
            ) from error


@contextmanager
def _ray(config: AppConfig, listen: Listen) -> Iterator[None]:
    quiet = {"log_to_driver": listen.verbose, "logging_level": logging.INFO if listen.verbose else logging.WARNING}
    try:
        if listen.address is None:
            cpus = max(os.cpu_count() or 1, config.num_replicas)
            ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        else:
            ray.init(listen.address, **quiet)
    except (ConnectionError, RuntimeError, OSError) as error:
        raise LaunchFailed(f"Ray did not come up: {error}") from error
    try:
        yield
    finally:
        with _hushed(listen):
            ray.shutdown()


@contextmanager
def _application(config: AppConfig, listen: Listen, stop: threading.Event) -> Iterator[None]:
    from deployments.app import build_app

    if not listen.verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": listen.host, "port": listen.port})
    try:
        if listen.address is None:
            _check_room(config)
        target = serve.RunTarget(build_app(config), name=APP, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        while not stop.is_set() and not _up(listen.url):
            stop.wait(POLL_S)
        yield
    finally:
        with _hushed(listen):
            if listen.address is None:
                serve.shutdown()
            else:
                serve.delete(APP)


def _check_room(config: AppConfig) -> None:
    """Refuse what a Ray of our own, which does not grow, would wait for without end."""
    from deployments.app import resources

    wanted, there = resources(config), ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        each = wanted[f"num_{kind.lower()}s"]
        if config.num_replicas * each > there.get(kind, 0):
            raise LaunchFailed(
                f"{config.num_replicas} replicas with {each:g} {kind}s each, where Ray has {there.get(kind, 0):g}: "
                f"say --device cpu, --num-{kind.lower()}s or --num-replicas"
            )


@contextmanager
def _hushed(listen: Listen) -> Iterator[None]:
    """Ray reports the controller that it has just ended as failed, from a thread of its own, on stdout or stderr."""
    nowhere = io.StringIO()
    with ExitStack() as stack:
        if not listen.verbose:
            stack.enter_context(redirect_stderr(nowhere))
            stack.enter_context(redirect_stdout(nowhere))
        yield


def _up(url: str) -> bool:
    """Whether the application answers.

    Raises:
        LaunchFailed: Serve has given up on it.
    """
    application = serve.status().applications.get(APP)
    if application is not None and application.status == ApplicationStatus.DEPLOY_FAILED:
        raise LaunchFailed(f"the application did not start:\n{_reason(application)}")
    if application is None or application.status != ApplicationStatus.RUNNING:
        return False
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=10).status == 200
    except OSError:
        return False


def _reason(application: ApplicationStatusOverview) -> str:
    """What the deployments say of themselves; the application's own message only counts them."""
    return "\n".join(d.message for d in application.deployments.values() if d.message) or application.message


@contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event; a second one ends the process as usual."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
