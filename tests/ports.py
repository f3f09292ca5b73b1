"""Ports for servers of tests that have to be told one."""

from __future__ import annotations

import random
import socket

NEVER_HANDED_OUT = range(20_000, 32_000)
"""Below those that a system gives to whoever asks for any, clients' ends among them, and above those of Ray's workers:
so nothing takes one between now and when its server listens."""


def free_ports(count: int) -> list[int]:
    """Different ones that nobody listens on."""
    drawn = random.SystemRandom().sample(NEVER_HANDED_OUT, len(NEVER_HANDED_OUT))
    found: list[int] = []
    while len(found) < count:
        port = drawn.pop()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found
