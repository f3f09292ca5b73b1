"""How often streams send.

Every message costs CPU time of all who pass it on: Ray's ingress was measured to take 0.4 to 0.7 ms, so that one
ingress was busy with 25 streams of 75 tokens a second, and everybody waited for it (docs/log.md, 2026-11-30). So the
more streams a replica has, the rarer each one sends, with all tokens that have come; and they send together, which
costs less than one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_S = 0.1
"""That a token waits for its message"""


class Pace:
    """Of one replica."""

    def __init__(self, messages_per_s: int) -> None:
        """messages_per_s: of all streams together, as far as LONGEST_S allows; 0: every token at once."""
        self._messages_per_s = messages_per_s
        self.streams = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """While a stream runs."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def pause(self) -> float:
        """Seconds in which a stream lets tokens gather after a message: until all send again."""
        if not self._messages_per_s or not self.streams:
            return 0.0
        interval = min(LONGEST_S, self.streams / self._messages_per_s)
        return interval - time.monotonic() % interval
