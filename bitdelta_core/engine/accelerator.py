"""What the engine asks of a device beside kernels: pinned memory, copies from beside, a stream, graphs, events.

`Plain` is a CPU: everything happens at once, and to capture a function is to keep it. So all that the engine builds on
this runs, and is tested, where there is no GPU. What only a GPU can show is in `Cuda`, and nothing else is.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any, Protocol, TypeVar

import torch

log = logging.getLogger(__name__)
T = TypeVar("T")
PIECE = 8 * 2**20
"""Bytes of one copy to the slab. Two are under way at most: what a step copies waits 0.4 ms behind them at 40 GB/s."""
PINNED_AT_ONCE = 8 * PIECE
"""Bytes of host memory: pinning holds the driver, and what a step launches waits for it. Whole pieces, because no copy
may cross from one pinned range into the next."""
WARM_UPS = 1
"""Runs before a capture: kernels are loaded, libraries take their workspaces"""


class Mark(Protocol):
    """A point in the order of what the steps launch."""

    def reached(self) -> bool: ...

    def wait(self) -> None: ...


class Accelerator(Protocol):
    """One device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def keeps_host_buffers(self) -> bool:
        """Whether host buffers are too slow to make anew for each use."""
        ...

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: copies between it and the device need not be waited for."""
        ...

    def pin(self, host: torch.Tensor) -> Callable[[], None]:
        """Make other host memory, whole pages of uint8, as good as a `host_buffer`. Returns what undoes it, which has
        to be called before the memory goes. Any thread."""
        ...

    def fill(self, extent: torch.Tensor, host: torch.Tensor) -> None:
        """Copy into the slab, beside running steps. The bytes are there when it returns. Called from any thread."""
        ...

    def in_steps(self) -> AbstractContextManager[object]:
        """Inside, what is launched runs in the order of the steps."""
        ...

    def mark(self) -> Mark:
        """Reached when all that has been launched `in_steps` has run."""
        ...

    def capture(self, launch: Callable[[], T]) -> Callable[[], T]:
        """A cheaper way to launch the same again: it reads and writes the same memory, whatever is there then, and
        returns what `launch` does. Calls `launch` a few times."""
        ...

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A copy, in the order of the steps. Does not wait."""
        ...

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, there when a mark that is made afterwards is reached."""
        ...

    def synchronize(self) -> None:
        """Wait for all that the device was given, by anybody."""
        ...

    def free_bytes(self) -> int:
        """Of the device's memory."""
        ...

    def release(self) -> None:
        """Give back to the driver what nobody refers to any more."""
        ...


class Plain:
    """A CPU."""

    keeps_host_buffers = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, host: torch.Tensor) -> Callable[[], None]:
        return lambda: None

    def fill(self, extent: torch.Tensor, host: torch.Tensor) -> None:
        extent.copy_(host)

    def in_steps(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Mark:
        return _Reached()

    def capture(self, launch: Callable[[], T]) -> Callable[[], T]:
        return launch

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.clone()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 0

    def release(self) -> None:
        gc.collect()


class _Reached:
    def reached(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Cuda:
    """A GPU. One stream for all steps and captures, one of lower priority for copies to the slab, one memory pool for
    all graphs."""

    keeps_host_buffers = True

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._steps = torch.cuda.Stream(self.device, priority=-1)
        self._copies = torch.cuda.Stream(self.device, priority=0)
        self._copying = threading.Lock()
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(2)]
        """Reached at first, and when the last piece recorded with it has arrived."""
        with torch.cuda.device(self.device):
            self._pool = torch.cuda.graph_pool_handle()

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, host: torch.Tensor) -> Callable[[], None]:
        """Where the driver refuses, copies are slower, and a warning says so."""
        runtime: Any = torch.cuda.cudart()
        pinned: list[torch.Tensor] = []

        def undo() -> None:
            with torch.cuda.device(self.device):
                for piece in pinned:
                    runtime.cudaHostUnregister(piece.data_ptr())
            pinned.clear()

        with torch.cuda.device(self.device):
            for piece in host.split(PINNED_AT_ONCE):
                code = int(runtime.cudaHostRegister(piece.data_ptr(), piece.numel(), 0))
                if code:
                    log.warning("%d bytes of host memory cannot be pinned: cudaHostRegister: %d", host.numel(), code)
                    undo()
                    break
                pinned.append(piece)
        return undo

    def fill(self, extent: torch.Tensor, host: torch.Tensor) -> None:
        """One delta at a time, in pieces; the next is queued when the last but one has arrived."""
        with self._copying, torch.cuda.stream(self._copies):
            pieces = zip(extent.split(PIECE), host.split(PIECE), strict=True)
            for (to, piece), copied in zip(pieces, cycle(self._copied), strict=False):
                copied.synchronize()
                to.copy_(piece, non_blocking=True)
                copied.record(self._copies)
            for copied in self._copied:
                copied.synchronize()

    def in_steps(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._steps)

    def mark(self) -> Mark:
        return _Event(self._steps)

    def capture(self, launch: Callable[[], T]) -> Callable[[], T]:
        with self.in_steps():
            for _ in range(WARM_UPS):
                launch()
        self._steps.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: loader threads go on copying and allocating meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._steps, capture_error_mode="thread_local"):
            output = launch()

        def replay() -> T:
            graph.replay()
            return output

        return replay

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.pin_memory().to(self.device, non_blocking=True)  # torch keeps pinned memory until it is copied

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        gc.collect()
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def reached(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()


def accelerator_of(device: torch.device) -> Accelerator:
    return Cuda(device) if device.type == "cuda" else Plain(device)
