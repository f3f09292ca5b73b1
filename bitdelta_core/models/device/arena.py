"""Working memory: one buffer, carved anew for every size of step. Only one step is computed at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch

_ALIGNMENT = 256


class WorkArena:
    """Hands out tensors from the front of a buffer. Without a buffer it only counts what they would take."""

    def __init__(self, buffer: torch.Tensor | None) -> None:
        """`buffer`: uint8, aligned to 256 bytes; None: tensors are without memory, on torch's meta device."""
        self._buffer = buffer
        self._at = 0
        self.peak = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = prod(shape) * dtype.itemsize
        start, self._at = self._at, self._at + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.peak = max(self.peak, self._at)
        if self._buffer is None:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")
        assert self._at <= self._buffer.numel(), f"{self._at} bytes of {self._buffer.numel()}: planned for less"
        return self._buffer[start : start + nbytes].view(dtype).view(tuple(shape))

    @contextmanager
    def reused(self) -> Iterator[None]:
        """What is taken inside lies where the next thing will be taken afterwards: for what is not alive together."""
        start = self._at
        yield
        self._at = start
