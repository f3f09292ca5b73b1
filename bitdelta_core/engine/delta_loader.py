"""Who opens deltas and fills host buffers with them: this process, or others beside it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.engine.host_buffers import HostBuffer
from bitdelta_core.engine.layouts import Layout, LayoutRule
from bitdelta_core.engine.loader_processes import LoaderProcesses
from bitdelta_core.engine.loader_wire import Planned
from bitdelta_core.engine.shared_memory import SharedMemory
from bitdelta_core.models.share import Share
from bitdelta_core.models.variant import BaseWeights

VALUES_EACH = 2**24
"""Integers to decode that are worth another process: a quarter of a second"""


class LoadableDelta(Protocol):
    """A valid delta. Its directory may go; the bytes of its files are held."""

    @property
    def layout(self) -> Layout:
        """For use: filling it is this one's business."""
        ...

    def fill(self, host: HostBuffer) -> None:
        """Once. Raises DeltaError."""
        ...


class DeltaLoader(Protocol):
    """Any thread may call."""

    @property
    def make_memory(self) -> Callable[[int], SharedMemory] | None:
        """How host buffers of so many bytes are made that it can fill; None: any will do."""
        ...

    def open(self, path: Path) -> LoadableDelta:
        """Validate and plan the delta in a directory, and hold its files. Raises DeltaError."""
        ...

    def close(self) -> None:
        """Whoever is waiting for it gets an error."""
        ...


class ThreadLoader:
    """In the thread that calls."""

    make_memory = None

    def __init__(
        self, rule: LayoutRule, base_sha256: str, base_shapes: Mapping[str, tuple[int, ...]], weights: BaseWeights
    ) -> None:
        self._rule = rule
        self._base_sha256 = base_sha256
        self._base_shapes = base_shapes
        self._weights = weights

    def open(self, path: Path) -> LoadableDelta:
        reader = open_delta(path, expected_base_sha256=self._base_sha256, base_shapes=self._base_shapes)
        reader.map_files()
        return _MappedDelta(reader, self._rule.plan(reader.config), self._weights)

    def close(self) -> None:
        pass


class _MappedDelta:
    def __init__(self, reader: DeltaReader, layout: Layout, weights: BaseWeights) -> None:
        self.layout = layout
        self._reader = reader
        self._weights = weights

    def fill(self, host: HostBuffer) -> None:
        self.layout.fill(self._reader, host.bytes_, self._weights)


class ProcessLoader:
    """In other processes: this one's interpreter, which runs the steps, has next to nothing to do."""

    def __init__(self, processes: LoaderProcesses) -> None:
        self._processes = processes
        self.make_memory = processes.make_memory

    def open(self, path: Path) -> LoadableDelta:
        planned: Planned = self._processes.call("open", path=str(path))
        return _PlannedDelta(self._processes, planned, HeldFiles(path, planned.files))

    def close(self) -> None:
        self._processes.close()


class _PlannedDelta:
    def __init__(self, processes: LoaderProcesses, planned: Planned, files: HeldFiles) -> None:
        self.layout = planned.layout
        self._processes = processes
        self._stored = planned.stored
        self._files = files

    def fill(self, host: HostBuffer) -> None:
        assert host.shared is not None, "memory that loader processes cannot see"
        assert self._stored, "filled twice"
        fill = partial(
            self._processes.call, "fill", stored=self._stored, nbytes=self.layout.nbytes, memory=host.shared,
            files=self._files.descriptors,
        )  # fmt: skip
        count = min(self._processes.count, max(1, self.layout.coded_values // VALUES_EACH))
        with ThreadPoolExecutor(count, thread_name_prefix="delta-fill") as pool:
            shares = [pool.submit(fill, share=Share(i, count)) for i in range(count)]
        for share in shares:  # none of them writes any more, whatever became of the others
            share.result()
        self._files.close()
        self._stored = b""


class HeldFiles:
    """Open files of a directory, which may go: closed when nothing refers to them any more, or before."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.descriptors: list[int] = []
        self.close = weakref.finalize(self, _close, self.descriptors)
        for name in names:
            self.descriptors.append(os.open(path / name, os.O_RDONLY | os.O_CLOEXEC))


def _close(descriptors: list[int]) -> None:
    """Their numbers may soon be other files'."""
    while descriptors:
        os.close(descriptors.pop())
