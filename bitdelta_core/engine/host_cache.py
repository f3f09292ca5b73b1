"""Deltas that were copied into the slab, kept in the host buffers that they came in: a second copy is quick.

Least recently put goes first. What is taken out belongs to the taker again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from bitdelta_core.engine.host_buffers import HostBuffer, HostBuffers


class HostCache:
    """At most `nbytes` of host buffers. The engine thread's."""

    def __init__(self, buffers: HostBuffers, nbytes: int) -> None:
        self._buffers = buffers
        self._nbytes = nbytes
        self._kept: OrderedDict[str, tuple[Any, HostBuffer]] = OrderedDict()

    def put(self, delta: str, opened: Any, host: HostBuffer) -> None:
        """Keep it while there is room; others may go for it, or it goes at once."""
        assert delta not in self._kept
        self._kept[delta] = (opened, host)
        while self._used > self._nbytes:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._buffers.give_back(dropped)

    def pop(self, delta: str) -> tuple[Any, HostBuffer] | None:
        return self._kept.pop(delta, None)

    def clear(self) -> None:
        while self._kept:
            self._buffers.give_back(self._kept.popitem()[1][1])

    @property
    def _used(self) -> int:
        return sum(host.nbytes for _, host in self._kept.values())

    def check_integrity(self) -> None:
        """Assert that the budget is kept."""
        assert self._used <= self._nbytes, "the host cache is over its budget"
