"""Host memory that deltas pass through. Where it is slow to make (pinned), it is used again.

A buffer is lent to one delta at a time. Of those given back a few of each size are kept. What other processes fill is
made in memory that they see, and pinned here.
"""

from __future__ import annotations

import logging
import threading
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bitdelta_core.engine.accelerator import Accelerator
from bitdelta_core.engine.shared_memory import SharedMemory
from bitdelta_core.errors import BitDeltaError

log = logging.getLogger(__name__)
SMALLEST = 4 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class HostBuffer:
    """`bytes_`: uint8, as many as were asked for, of a buffer that may be larger."""

    bytes_: torch.Tensor
    whole: torch.Tensor
    shared: SharedMemory | None = None
    """What `whole` is, where another process fills it"""

    @property
    def nbytes(self) -> int:
        """What it takes of the host's memory."""
        return self.whole.numel()


class HostBuffers:
    """Any thread may take and give back."""

    def __init__(
        self, accelerator: Accelerator, *, keep: int, make_memory: Callable[[int], SharedMemory] | None = None
    ) -> None:
        """Args:
        keep: how many of one size that nobody uses
        make_memory: makes what other processes see too; slow, so that it is always kept
        """
        self._accelerator = accelerator
        self._make_memory = make_memory
        self._keeps = accelerator.keeps_host_buffers or make_memory is not None
        self._keep = keep if self._keeps else 0
        self._lock = threading.Lock()
        self._making = threading.Lock()
        """Held for long: who wants one may find that another was made for it"""
        self._kept: list[HostBuffer] = []
        """Smallest first."""
        self._made: Counter[int] = Counter()
        """By size; dropped ones too"""
        self._expected: set[int] = set()

    @property
    def made(self) -> int:
        return self._made.total()

    def take(self, nbytes: int) -> HostBuffer:
        """Raises DeltaUnavailable: it has to be made, and loader processes do not."""
        buffer = self._find(nbytes)
        if buffer is None:
            with self._making:
                buffer = self._find(nbytes) or self._make(_rounded(nbytes) if self._keeps else nbytes)
            self.expect(nbytes)
        return replace(buffer, bytes_=buffer.whole[:nbytes])

    def give_back(self, buffer: HostBuffer) -> None:
        """Nobody reads or writes it any more."""
        with self._lock:
            assert not any(kept.whole is buffer.whole for kept in self._kept), "given back twice"
            if sum(kept.nbytes == buffer.nbytes for kept in self._kept) < self._keep:
                insort(self._kept, buffer, key=lambda kept: kept.nbytes)

    def expect(self, nbytes: int) -> None:
        """Deltas of about that size will come: once for each size, as many buffers as are kept are made in the
        background, where they are slow to make."""
        size = _rounded(nbytes)
        with self._lock:
            if self._make_memory is None or size in self._expected:
                return
            self._expected.add(size)
        threading.Thread(target=self._make_ahead, args=(size,), name="delta-buffers", daemon=True).start()

    def close(self) -> None:
        """Free what is kept, and what is given back from now on."""
        with self._lock:
            self._keep = 0
            self._kept.clear()

    def _make_ahead(self, size: int) -> None:
        try:
            for _ in range(self._keep):
                with self._making:
                    if self._made[size] < self._keep:
                        self.give_back(self._make(size))
        except BitDeltaError as error:
            log.info("host buffers are not made ahead: %s", error)

    def _make(self, nbytes: int) -> HostBuffer:
        self._made[nbytes] += 1
        if self._make_memory is None:
            whole = self._accelerator.host_buffer(nbytes)
            return HostBuffer(whole, whole)
        memory = self._make_memory(nbytes)
        memory.when_freed(self._accelerator.pin(memory.bytes_))
        return HostBuffer(memory.bytes_, memory.bytes_, memory)

    def _find(self, nbytes: int) -> HostBuffer | None:
        with self._lock:
            for i, kept in enumerate(self._kept):
                if nbytes <= kept.nbytes <= _rounded(nbytes):  # a larger one is left for something larger
                    return self._kept.pop(i)
        return None

    def check_integrity(self) -> None:
        """Assert that what is kept is in order and not too much, and that no two share memory."""
        with self._lock:
            sizes = [kept.nbytes for kept in self._kept]
            assert sizes == sorted(sizes), "kept buffers are out of order"
            assert max(Counter(sizes).values(), default=0) <= self._keep, "too many buffers are kept"
            assert len({kept.whole.data_ptr() for kept in self._kept}) == len(sizes), "two buffers are one"


def _rounded(nbytes: int) -> int:
    """To a power of two, as torch's allocator of pinned memory does: so deltas of about one size share buffers."""
    return max(SMALLEST, 1 << (nbytes - 1).bit_length())
