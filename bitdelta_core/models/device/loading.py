"""The base's weights from safetensors files straight into device memory.

Threads read pieces of the files into a few small pinned buffers and copy each on a stream of its own, so that disk (or
page cache), host copies and the bus overlap. Host memory is THREADS * 2 * PIECE bytes, whatever the model. Weights that
are stored in another dtype are converted on the device.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.errors import CheckpointError
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.weights import Weights

THREADS = 4
PIECE = 32 * 2**20


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive bytes of one tensor, and where their values go."""

    file: Path
    start: int
    stop: int
    dtype: torch.dtype
    out: torch.Tensor


def load_weights(checkpoint: Checkpoint, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Weights:
    """As `Weights.read`. The weights are there when it returns.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, is not of the architecture, or a file ends
            before its tensors do.
    """
    weights = Weights.empty(checkpoint, config, device=device, dtype=dtype)
    pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
    for name, out in weights.parts():
        for piece in _pieces(checkpoint, name, out):
            pieces.put(piece)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="load-weights") as pool:
        for done in [pool.submit(_copy_all, pieces, device) for _ in range(THREADS)]:
            done.result()
    return weights


def _pieces(checkpoint: Checkpoint, name: str, out: torch.Tensor) -> Iterator[_Piece]:
    stored = checkpoint.location(name)
    flat, size = out.view(-1), stored.dtype.itemsize
    step = PIECE // size
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step]
        start = stored.start + first * size
        yield _Piece(stored.file, start, start + part.numel() * size, stored.dtype, part)


def _copy_all(pieces: queue.SimpleQueue[_Piece], device: torch.device) -> None:
    """Take pieces until there are none. While one buffer's copy runs, the other is read into."""
    cuda = device.type == "cuda"
    buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    stream = torch.cuda.Stream(device) if cuda else None
    copied = [torch.cuda.Event() if cuda else None for _ in buffers]
    turn = 0
    with torch.cuda.stream(stream) if cuda else nullcontext():
        while (piece := _next(pieces)) is not None:
            event = copied[turn]
            if event is not None:
                event.synchronize()
            host = buffers[turn][: piece.stop - piece.start]
            _read(piece, host)
            stored = host.view(piece.dtype)
            if stored.dtype != piece.out.dtype:  # else torch converts on the host
                stored = stored.to(device, non_blocking=True)
            piece.out.copy_(stored, non_blocking=True)
            if event is not None:
                event.record()
            turn = 1 - turn
    if stream is not None:
        stream.synchronize()


def _next(pieces: queue.SimpleQueue[_Piece]) -> _Piece | None:
    try:
        return pieces.get_nowait()
    except queue.Empty:
        return None


def _read(piece: _Piece, host: torch.Tensor) -> None:
    view = host.numpy().data
    with piece.file.open("rb", buffering=0) as stream:
        stream.seek(piece.start)
        _read_whole(stream, view, piece)


def _read_whole(stream: BinaryIO, view: memoryview, piece: _Piece) -> None:
    at = 0
    while at < len(view):
        count = stream.readinto(view[at:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CheckpointError(f"{piece.file} ends at byte {piece.start + at}, its header promises {piece.stop}")
        at += count
