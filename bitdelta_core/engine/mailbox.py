"""From the engine's thread to asyncio: the events of one step cross over in one call per event loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

Delivery = tuple["asyncio.Queue[Any]", Any]


class Mailbox:
    """Filled and flushed by the engine's thread."""

    def __init__(self) -> None:
        self._waiting: defaultdict[asyncio.AbstractEventLoop, list[Delivery]] = defaultdict(list)

    def post(self, loop: asyncio.AbstractEventLoop, to: asyncio.Queue[Any], item: Any) -> None:
        self._waiting[loop].append((to, item))

    def flush(self) -> None:
        """Hand everything over. What was meant for a loop that has been closed is dropped: nobody can read it."""
        for loop, deliveries in self._waiting.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:
                if not loop.is_closed():
                    raise
        self._waiting.clear()


def _deliver(deliveries: list[Delivery]) -> None:
    for to, item in deliveries:
        to.put_nowait(item)
