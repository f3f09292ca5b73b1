"""Deltas of every codec on disk, and the two ways to read them into host buffers."""

from __future__ import annotations

import copy
import io
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta import auto
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.writer import write
from bitdelta_core.engine.accelerator import Plain
from bitdelta_core.engine.delta_loader import DeltaLoader, ProcessLoader, ThreadLoader
from bitdelta_core.engine.host_buffers import HostBuffer, HostBuffers
from bitdelta_core.engine.layouts import LayoutRule
from bitdelta_core.engine.loader_process import serve
from bitdelta_core.engine.loader_processes import LoaderProcesses
from bitdelta_core.engine.loader_wire import Setup
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.weights import Weights
from tests.tiny import make_finetune
from tests.unit.models_harness import FakeDelta, base_state
from tests.unit.test_models_variants import KINDS, TABLES, random_delta

CPU = torch.device("cpu")


class ThreadedProcess:
    """A loader process that is a thread of this one: all but the process, and at once."""

    pid = 0
    returncode = 0

    def __init__(self, theirs: socket.socket, threads: int) -> None:
        self.stdout = io.BytesIO()
        self._thread = threading.Thread(target=self._serve, args=(theirs.dup(),), daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Its end of the socket is shut."""

    def wait(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(EOFError, ConnectionError):
            serve(sock)


class Place:
    """A base, deltas for it, and how they are laid out."""

    def __init__(self, base: Path, work: Path, **rule: Any) -> None:
        self.base = base
        self.checkpoint = Checkpoint(base)
        self.sha256 = self.checkpoint.sha256()
        self.shapes = {name: self.checkpoint.shape(name) for name in self.checkpoint.names}
        self.model = ModelConfig.from_hf(self.checkpoint.config)
        self.rule = LayoutRule(**{"decoder": "torch", "model": self.model, "dtype": torch.float32, **rule})
        self._work = work

    def laid_out(self, **rule: Any) -> Place:
        """The same base and deltas."""
        other = copy.copy(self)
        other.deltas = self.deltas
        other.rule = replace(self.rule, **rule)
        return other

    def setup(self) -> Setup:
        return Setup(
            base=str(self.base),
            base_fingerprint=self.checkpoint.fingerprint(),
            base_sha256=self.sha256,
            base_shapes=self.shapes,
            rule=self.rule,
            threads=1,
        )

    def threads(self) -> ThreadLoader:
        weights = Weights.read(self.checkpoint, self.model, device=CPU, dtype=self.rule.dtype)
        return ThreadLoader(self.rule, self.sha256, self.shapes, weights)

    @cached_property
    def deltas(self) -> Mapping[str, Path]:
        """One for every codec, form of scales and table; with changed vectors."""
        state, tied = base_state(self.base), self.model.tie_word_embeddings
        found = {}
        for seed, kind in enumerate([*KINDS, *(f"table-{name}" for name in TABLES)]):
            linear, table = (kind, None) if kind in KINDS else ("sign", kind.removeprefix("table-"))
            found[kind] = self.write(kind, random_delta(state, seed, linear, table, tied=tied))
        fine = make_finetune(self.base, self._work / "fine", scale=0.3)
        options = AutoOptions(bits=0.5, texts=4)
        return found | {"auto": auto.compress(self.base, fine, self._work / "auto", options)}

    def write(self, name: str, delta: FakeDelta) -> Path:
        config = DeltaConfig(
            base_sha256=self.sha256,
            codec="auto",
            tensors=dict(sorted(delta.tensors.items())),
            files={},
            config_overrides=delta.config_overrides,
        )
        parts = ((entry, delta.parts[entry.name]) for entry in config.tensors.values())
        return write(self._work / name, config, parts, sidecars={})


def host_buffers(processes: LoaderProcesses, keep: int = 2) -> HostBuffers:
    return HostBuffers(Plain(CPU), keep=keep, make_memory=processes.make_memory)


def filled(loader: DeltaLoader, delta: Path, hosts: HostBuffers | None = None) -> torch.Tensor:
    """The extent's bytes. What is filled is poisoned first."""
    loadable = loader.open(delta)
    nbytes = loadable.layout.nbytes
    host = HostBuffer(whole := torch.empty(nbytes, dtype=torch.uint8), whole) if hosts is None else hosts.take(nbytes)
    host.bytes_.fill_(0xA5)
    try:
        loadable.fill(host)
        return host.bytes_.clone()
    finally:
        if hosts is not None:
            hosts.give_back(host)
            hosts.check_integrity()


def process_loader(place: Place, count: int = 1) -> tuple[LoaderProcesses, ProcessLoader]:
    processes = LoaderProcesses(place.setup(), count)
    return processes, ProcessLoader(processes)
