"""The slab: one buffer, taken once, in which the deltas live that rows are computed with.

An extent is a run of bytes that belongs to one key. Extents start at multiples of 256 bytes. An extent with pins is in
use and stays; the others are kept while there is room and go least recently used first. Extents never move: kernels and
views hold their addresses. So free bytes may be scattered; `plan` then evicts, in least-recently-used order, until a
hole is large enough, and gives back None while pinned extents leave no such hole (they go when their sequences end).
There may be a limit to the number of extents too: device tables have so many entries and no more.

`plan` is pure; `commit` cannot fail.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from bitdelta_core.errors import DeltaTooLarge

ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes `start:stop` of the slab."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class SlabPlan:
    """Where `key` will go, and who has to leave for it."""

    key: str
    extent: Extent
    evict: tuple[str, ...] = ()


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Slab:
    """`nbytes` of device memory, rounded down to the alignment, behind `reserved` bytes that are nobody's extent."""

    def __init__(
        self, nbytes: int, device: torch.device | str = "cpu", *, reserved: int = 0, max_extents: int | None = None
    ) -> None:
        self.nbytes = nbytes // ALIGNMENT * ALIGNMENT
        self.reserved = align(reserved)
        self.max_extents = max_extents
        self.buffer = torch.empty(self.reserved + self.nbytes, dtype=torch.uint8, device=device)
        self._extents: OrderedDict[str, Extent] = OrderedDict()
        self._pins: dict[str, int] = {}

    @property
    def used(self) -> int:
        return sum(extent.nbytes for extent in self._extents.values())

    @property
    def keys(self) -> tuple[str, ...]:
        """Least recently used first."""
        return tuple(self._extents)

    @property
    def pinned(self) -> tuple[str, ...]:
        return tuple(key for key in self._extents if self._pins[key])

    def __contains__(self, key: str) -> bool:
        return key in self._extents

    def pins(self, key: str) -> int:
        return self._pins[key]

    def start(self, key: str) -> int:
        """Where the extent begins in the buffer, in bytes."""
        return self._extents[key].start

    def view(self, key: str) -> torch.Tensor:
        """uint8 [extent bytes], a view."""
        extent = self._extents[key]
        return self.buffer[extent.start : extent.stop]

    def check_fits(self, key: str, nbytes: int) -> None:
        """Raise DeltaTooLarge when `nbytes` would not even fit an empty slab."""
        if align(max(nbytes, 1)) > self.nbytes:
            raise DeltaTooLarge(
                f"the delta needs {nbytes} bytes on the device, the slab has {self.nbytes}: raise slab_bytes", delta=key
            )

    def plan(self, key: str, nbytes: int) -> SlabPlan | None:
        """Where a new extent of `nbytes` would go; None while pins are in the way.

        Raises:
            DeltaTooLarge: never will there be room.
        """
        assert key not in self._extents, f"{key} has an extent already"
        self.check_fits(key, nbytes)
        need = align(max(nbytes, 1))
        kept = dict(self._extents)
        for victim in ("", *self._unpinned()):
            kept.pop(victim, None)
            start = self._first_fit(sorted(kept.values(), key=lambda e: e.start), need)
            if start is not None:
                extent = Extent(start, start + need)
                overlapped = [k for k, e in self._extents.items() if _overlap(e, extent)]
                evict = self._within_limit(overlapped)
                return None if evict is None else SlabPlan(key, extent, evict)
        return None

    def commit(self, plan: SlabPlan) -> torch.Tensor:
        """Evict whom the plan names and create the extent, with one pin. Returns its view."""
        for victim in plan.evict:
            self.remove(victim)
        self._extents[plan.key] = plan.extent
        self._pins[plan.key] = 1
        return self.view(plan.key)

    def pin(self, key: str) -> None:
        """One more user. The key becomes the most recently used."""
        self._pins[key] += 1
        self._extents.move_to_end(key)

    def unpin(self, key: str) -> None:
        assert self._pins[key] > 0, f"unpin of {key} without a pin"
        self._pins[key] -= 1

    def remove(self, key: str) -> None:
        assert self._pins[key] == 0, f"{key} is in use"
        del self._extents[key], self._pins[key]

    def _unpinned(self) -> list[str]:
        """Least recently used first."""
        return [key for key in self._extents if not self._pins[key]]

    def _first_fit(self, extents: list[Extent], need: int) -> int | None:
        at = self.reserved
        for extent in extents:
            if extent.start - at >= need:
                return at
            at = extent.stop
        return at if self.buffer.numel() - at >= need else None

    def _within_limit(self, evict: list[str]) -> tuple[str, ...] | None:
        """`evict`, and whoever else has to go for one more extent to be allowed; None while pins forbid it."""
        others = [key for key in self._unpinned() if key not in evict]
        surplus = 0 if self.max_extents is None else len(self._extents) - len(evict) + 1 - self.max_extents
        return None if surplus > len(others) else (*evict, *others[: max(0, surplus)])

    def check_integrity(self) -> None:
        """Assert that extents are aligned, inside the buffer and disjoint, and that pins belong to extents."""
        at = self.reserved
        for extent in sorted(self._extents.values(), key=lambda e: e.start):
            assert extent.start >= at, "extents overlap"
            assert extent.start % ALIGNMENT == 0 == extent.stop % ALIGNMENT, "extent is not aligned"
            assert extent.stop > extent.start, "extent is empty"
            at = extent.stop
        assert at <= self.buffer.numel(), "extent beyond the slab"
        assert self.max_extents is None or len(self._extents) <= self.max_extents, "more extents than allowed"
        assert self._pins.keys() == self._extents.keys(), "pins without extent"
        assert all(pins >= 0 for pins in self._pins.values()), "negative pins"


def _overlap(a: Extent, b: Extent) -> bool:
    return a.start < b.stop and b.start < a.stop
