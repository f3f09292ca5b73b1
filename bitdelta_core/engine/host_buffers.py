"""Host memory that deltas pass through. Where it is slow to make (pinned), it is used again.

A buffer is lent to one delta at a time. Of those given back a few are kept, the smallest go first: a large one serves
small deltas too, the other way round not.
"""

from __future__ import annotations

import threading
from bisect import insort
from dataclasses import dataclass

import torch

from bitdelta_core.engine.accelerator import Accelerator

SMALLEST = 4 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class HostBuffer:
    """`bytes_`: uint8, as many as were asked for, of a buffer that may be larger."""

    bytes_: torch.Tensor
    whole: torch.Tensor

    @property
    def nbytes(self) -> int:
        """What it takes of the host's memory."""
        return self.whole.numel()


class HostBuffers:
    """Any thread may take and give back."""

    def __init__(self, accelerator: Accelerator, *, keep: int) -> None:
        """`keep`: how many that nobody uses."""
        self._accelerator = accelerator
        self._keep = keep if accelerator.keeps_host_buffers else 0
        self._lock = threading.Lock()
        self._kept: list[torch.Tensor] = []
        """Smallest first."""
        self.made = 0

    def take(self, nbytes: int) -> HostBuffer:
        whole = self._find(nbytes)
        if whole is None:
            size = _rounded(nbytes) if self._accelerator.keeps_host_buffers else nbytes
            whole = self._accelerator.host_buffer(size)
            self.made += 1
        return HostBuffer(whole[:nbytes], whole)

    def give_back(self, buffer: HostBuffer) -> None:
        """Nobody reads or writes it any more."""
        with self._lock:
            assert not any(kept is buffer.whole for kept in self._kept), "given back twice"
            insort(self._kept, buffer.whole, key=torch.Tensor.numel)
            del self._kept[: max(0, len(self._kept) - self._keep)]

    def _find(self, nbytes: int) -> torch.Tensor | None:
        with self._lock:
            for i, kept in enumerate(self._kept):
                if nbytes <= kept.numel() <= _rounded(nbytes):  # a larger one is left for something larger
                    return self._kept.pop(i)
        return None

    def check_integrity(self) -> None:
        """Assert that what is kept is in order and not too much."""
        with self._lock:
            sizes = [kept.numel() for kept in self._kept]
            assert sizes == sorted(sizes), "kept buffers are out of order"
            assert len(sizes) <= self._keep, "too many buffers are kept"


def _rounded(nbytes: int) -> int:
    """To a power of two, as torch's allocator of pinned memory does: so deltas of about one size share buffers."""
    return max(SMALLEST, 1 << (nbytes - 1).bit_length())
