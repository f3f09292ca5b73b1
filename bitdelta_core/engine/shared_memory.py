"""Memory that a process of ours can map too. Linux: anonymous files, which no /dev/shm of a container limits."""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Callable

import torch

_keys = itertools.count(1)


class SharedMemory:
    """`nbytes` of zeros. Given back to the system when nothing refers to it any more, in whatever process."""

    def __init__(self, nbytes: int) -> None:
        self.key = next(_keys)
        """Of this process; no other memory ever has it"""
        self.nbytes = nbytes
        self.fd = os.memfd_create("bitdelta-host-buffer", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, nbytes)
        self.bytes_ = mapped(self.fd, nbytes)

    def when_freed(self, undo: Callable[[], None]) -> None:
        """Call `undo` before the memory goes; not when the interpreter ends, where the system does it."""
        weakref.finalize(self, undo).atexit = False


def mapped(fd: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] over the file's bytes; mapped for as long as the tensor lives. `fd` may be closed."""
    assert os.fstat(fd).st_size == nbytes, "another memory than was announced"
    return torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)


def available() -> bool:
    """Whether this system has it."""
    return hasattr(os, "memfd_create")
