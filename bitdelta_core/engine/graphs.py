"""Decode steps that were launched once and are replayed: one graph for each number of rows and what its rows may need.

A step is padded up to the next size. What its variants and its sampling need is covered by a family of graphs that was
captured for at least that. A need that no family covers makes a new one, of which each size is captured when a step
first has it. Families are few: after MAX_FAMILIES a new one covers all that there are, too.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from bitdelta_core.engine.accelerator import Accelerator
from bitdelta_core.models.device.kinds import StepKinds, few_ranks, single, step_union
from kernels.device import Kinds
from kernels.sampling.rows import GREEDY, Wants

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
SAMPLING = (GREEDY, Wants(ranks=False), Wants())
"""What sampling is captured for, narrowest first."""
MAX_FAMILIES = 8
BASE = StepKinds()
Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class Shape:
    """All that a captured step depends on."""

    rows: int
    kinds: StepKinds
    wants: Wants


class DecodeGraphs(Generic[Output]):
    """`launch(shape)` launches a step of that shape from its fixed buffers and returns where its results are."""

    def __init__(
        self,
        accelerator: Accelerator,
        launch: Callable[[Shape], Output],
        *,
        max_rows: int,
        sizes: Sequence[int] | None,
    ) -> None:
        """Args:
        max_rows: of any step.
        sizes: which to capture; None: SIZES up to max_rows. Steps of other sizes are launched kernel by kernel.
        """
        self._accelerator = accelerator
        self._launch = launch
        chosen = (*(n for n in SIZES if n < max_rows), max_rows) if sizes is None else sizes
        self._captured_sizes = frozenset(n for n in chosen if n <= max_rows)
        self.sizes = tuple(sorted({*self._captured_sizes, max_rows}))
        self._families = [BASE]
        self._graphs: dict[Shape, Callable[[], Output]] = {}

    @property
    def captured(self) -> int:
        return len(self._graphs)

    def shape_for(self, rows: int, kinds: StepKinds, wants: Wants) -> Shape:
        """The least that has room for the rows and does what they may need."""
        size = self.sizes[bisect_left(self.sizes, rows)]
        return Shape(size, self._family(kinds), next(w for w in SAMPLING if w | wants == w))

    def is_missing(self, shape: Shape) -> bool:
        """Whether `capture` has to come before `launch`."""
        return shape.rows in self._captured_sizes and shape not in self._graphs

    def capture(self, shape: Shape) -> None:
        """Launches the step a few times, with what its buffers hold: let that be padding."""
        began = time.monotonic()
        self._graphs[shape] = self._accelerator.capture(partial(self._launch, shape))
        seconds = time.monotonic() - began
        log.info("captured a step of %d rows in %.2f s: %s, %s", shape.rows, seconds, shape.kinds, shape.wants)

    def expected(self, kinds: Sequence[StepKinds]) -> Iterator[Shape]:
        """All sizes, of the bare base and of these, with and without several rows of one variant; the largest first:
        when they are captured, the others find their memory in its pool."""
        families = dict.fromkeys(self._family(k) for k in (BASE, *(single(k) for k in kinds), *kinds))
        for rows in sorted(self._captured_sizes, reverse=True):
            for family in families:
                if rows == 1 and single(family) != family:
                    continue  # one row is never several
                yield from (Shape(rows, family, wants) for wants in SAMPLING[:2])

    def capture_all(self, kinds: Sequence[StepKinds]) -> None:
        """What is `expected`."""
        for shape in self.expected(kinds):
            self.capture(shape)

    def launch(self, shape: Shape) -> Output:
        """What `shape_for` gave."""
        assert not self.is_missing(shape), "launched before it was captured"
        return self._graphs[shape]() if shape in self._graphs else self._launch(shape)

    def _family(self, kinds: StepKinds) -> StepKinds:
        """The narrowest that covers them."""
        covering = [family for family in self._families if step_union([family, kinds]) == family]
        if covering:
            return min(covering, key=_width)
        new = few_ranks(kinds)
        if len(self._families) >= MAX_FAMILIES:
            new = step_union([*self._families, new])
        self._families.append(new)
        return new


def _width(kinds: StepKinds) -> tuple[int, int]:
    """How much more than the base is launched: kinds first, then their sizes."""
    parts: list[Kinds] = [kinds.layers, kinds.embed, kinds.head]
    flags = sum(k.signs + k.columns + k.dense + k.rows + (k.rank > 0) + (k.byte_rank > 0) for k in parts)
    flags += sum(k.signs and not k.single for k in parts)
    return flags, sum(k.planes + k.rank + k.byte_rank for k in parts)
