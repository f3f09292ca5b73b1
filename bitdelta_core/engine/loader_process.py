"""A process that opens deltas and fills host buffers, so that the engine's has its interpreter for steps.

    python -m bitdelta_core.engine.loader_process SOCKET

SOCKET is the number of an inherited descriptor. It answers one request after the other, and ends when the other end of
the socket is closed, as it is when the engine's process dies. It remembers the buffers that it has mapped, and nothing
of a delta: any process can fill what another has opened, or a share of it.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import socket
import sys
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.engine.layouts import Layout
from bitdelta_core.engine.loader_wire import Answer, Planned, Received, Request, Setup, close_all, receive, send
from bitdelta_core.engine.shared_memory import mapped
from bitdelta_core.errors import BitDeltaError, CheckpointError
from bitdelta_core.models.share import Share
from bitdelta_core.models.weights import MappedWeights

log = logging.getLogger(__name__)


class Worker:
    """Its public methods are what can be asked for: `Request.call`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._buffers: dict[int, torch.Tensor] = {}

    def open(self, path: str) -> Planned:
        """Validate and plan the delta in a directory.

        Raises:
            DeltaError: as `open_delta` and `LayoutRule.plan`.
        """
        setup = self._setup
        reader = open_delta(path, expected_base_sha256=setup.base_sha256, base_shapes=setup.base_shapes)
        layout = setup.rule.plan(reader.config)
        stored = pickle.dumps((reader, layout), pickle.HIGHEST_PROTOCOL)
        return Planned(layout=layout.for_use(), files=reader.config.weight_files, stored=stored)

    def touch(self, *, buffer: torch.Tensor) -> None:
        """Take the buffer's pages from the system: here, where nobody waits for it."""
        buffer.zero_()

    def fill(self, stored: bytes, nbytes: int, share: Share, *, files: list[int], buffer: torch.Tensor) -> None:
        """Write a share of a delta's extent into the first `nbytes` of the buffer.

        Args:
            stored: `Planned.stored`
            files: descriptors of `Planned.files`, whose directory may be gone

        Raises:
            DeltaFormatError: as `Layout.fill`.
            CheckpointError: the base is needed, and is not what it was.
        """
        reader: DeltaReader
        layout: Layout
        reader, layout = pickle.loads(stored)
        assert nbytes == layout.nbytes
        names = reader.config.weight_files
        places = {name: Path(f"/proc/self/fd/{descriptor}") for name, descriptor in zip(names, files, strict=True)}
        layout.fill(reader.at(places), buffer[:nbytes], self, share)

    def linear_weight(self, name: str) -> torch.Tensor:
        """Of the base, which is opened when the first delta needs it."""
        return self._base.linear_weight(name)

    @property
    def vectors_V(self) -> torch.Tensor:
        return self._base.vectors_V

    @cached_property
    def _base(self) -> MappedWeights:
        setup = self._setup
        checkpoint = Checkpoint(setup.base)
        if checkpoint.fingerprint() != setup.base_fingerprint:
            raise CheckpointError(f"{setup.base}: its files have changed since the engine has read them")
        return MappedWeights(checkpoint, setup.rule.model, setup.rule.dtype)

    def answer(self, received: Received) -> Answer:
        """Do what is asked for. Closes the descriptors."""
        request: Request = received.value
        try:
            arguments = {**request.arguments, **self._passed(request, received.descriptors)}
            value = getattr(self, request.call)(**arguments)
            return Answer(number=request.number, value=value)
        except Exception as error:
            if not isinstance(error, BitDeltaError):
                log.exception("%s failed", request.call)
            return Answer(number=request.number, error=_portable(error))
        finally:
            close_all(received.descriptors)

    def _passed(self, request: Request, descriptors: list[int]) -> dict[str, object]:
        """The arguments that are descriptors."""
        for key in request.forget:
            self._buffers.pop(key, None)
        passed: dict[str, object] = {}
        files = list(descriptors)
        if request.buffer is not None:
            if request.buffer.is_new:
                self._buffers[request.buffer.key] = mapped(files.pop(), request.buffer.nbytes)
            passed["buffer"] = self._buffers[request.buffer.key]
        return passed | ({"files": files} if files else {})


def _portable(error: Exception) -> Exception:
    """The error, if it survives the way; or else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def serve(sock: socket.socket) -> None:
    """Answer until the other end is closed."""
    first = receive(sock)
    if first is None:
        return
    torch.set_num_threads(first.value.threads)
    worker = Worker(first.value)
    while (received := receive(sock)) is not None:
        send(sock, worker.answer(received))


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    with suppress(ImportError):  # without Triton nobody asks for it; otherwise the first load need not wait for it
        importlib.import_module("bitdelta_core.models.device.layout")
    try:
        serve(socket.socket(fileno=int(sys.argv[1])))
    except (EOFError, ConnectionError):
        return  # the engine has ended meanwhile


if __name__ == "__main__":
    main()
