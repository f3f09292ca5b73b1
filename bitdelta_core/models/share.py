"""What one of several does of the work of filling an extent, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Share:
    """One of `count`; all of them together are the whole."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, f"share {self.index} of {self.count}"

    def of(self, costs: Sequence[int]) -> slice:
        """Which neighbours among pieces of work are this one's: those whose middle lies in its part of the sum."""
        middles = [2 * end - cost for end, cost in zip(accumulate(costs), costs, strict=True)]
        before = [sum(m * self.count < i * 2 * sum(costs) for m in middles) for i in range(self.count)]
        return slice(before[self.index], [*before, len(costs)][self.index + 1])


WHOLE = Share()
