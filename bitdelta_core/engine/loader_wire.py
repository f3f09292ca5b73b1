"""What passes between the engine and its loader processes: pickled values, each behind its length, and descriptors.

Both ends are this code, of one version, in processes of one user; nobody else has the socket.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdelta_core.engine.layouts import Layout, LayoutRule

MAX_DESCRIPTORS = 250
"""Of one message: Linux takes 253."""
_LENGTH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The first message to a process. It is not answered."""

    base: str
    """Directory of the base's checkpoint"""
    base_fingerprint: str
    """Of its files when the engine read them"""
    base_sha256: str
    base_shapes: Mapping[str, tuple[int, ...]]
    rule: LayoutRule
    threads: int
    """That torch computes with"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """A memory that both sides map."""

    key: int
    nbytes: int
    is_new: bool
    """Its descriptor is the last of the message; afterwards the key alone names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    number: int
    """Its answer has the same"""
    call: str
    """A method of `loader_process.Worker`"""
    arguments: Mapping[str, Any]
    buffer: Buffer | None = None
    forget: tuple[int, ...] = ()
    """Keys of buffers that are gone"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    number: int
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A valid delta."""

    layout: Layout
    """For use: without what filling it needs"""
    files: tuple[str, ...]
    """Its weight files"""
    stored: bytes
    """What a process needs to fill it, beside descriptors of `files`: nothing that the engine reads"""


@dataclass(slots=True)
class Received:
    value: Any
    descriptors: list[int] = field(default_factory=list)
    """The receiver's to close"""


def send(sock: socket.socket, value: Any, descriptors: Sequence[int] = ()) -> None:
    """Raises OSError, BrokenPipeError where nobody is there."""
    if len(descriptors) > MAX_DESCRIPTORS:
        raise OSError(f"{len(descriptors)} files at once, at most {MAX_DESCRIPTORS}")
    body = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    length = len(body).to_bytes(_LENGTH, "little")
    sent = socket.send_fds(sock, [length], list(descriptors)) if descriptors else 0
    sock.sendall(length[sent:] + body)


def receive(sock: socket.socket) -> Received | None:
    """The next message; None: the other side has gone.

    Raises:
        EOFError: it has gone in the middle of a message.
        OSError: the connection is broken.
    """
    head, descriptors, _, _ = socket.recv_fds(sock, _LENGTH, MAX_DESCRIPTORS)
    if not head:
        return None
    try:
        length = head + _read(sock, _LENGTH - len(head))
        return Received(pickle.loads(_read(sock, int.from_bytes(length, "little"))), descriptors)
    except BaseException:
        close_all(descriptors)
        raise


def _read(sock: socket.socket, nbytes: int) -> bytearray:
    body = bytearray(nbytes)
    view = memoryview(body)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise EOFError("the other side has gone")
        view = view[count:]
    return body


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
