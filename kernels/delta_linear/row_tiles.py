"""The rows of a prefill's segments in tiles of one entry each, which the host cuts and products go by.

The device has the tiles of every size of SIZES, those of the largest first: products choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Rows = tuple[int, int, int]
"""(entry, start, stop)"""
SIZES = (256, 128, 64)
ROWS = SIZES[0]


def row_tiles(segments: Sequence[Rows]) -> list[list[int]]:
    """(entry, start, stop, 0) of row tiles, for each of SIZES."""
    return [tile for size in SIZES for tile in cut(segments, size)]


def cut(segments: Sequence[Rows], size: int) -> list[list[int]]:
    """(entry, start, stop, 0) of tiles of at most `size` rows and one entry each, in the segments' order."""
    return [
        [entry, first, min(first + size, stop), 0]
        for entry, start, stop in segments
        for first in range(start, stop, size)
    ]


def starts(segments: Sequence[Rows]) -> dict[int, int]:
    """Where the tiles of each size begin among all row tiles."""
    found, at = {}, 0
    for size in SIZES:
        found[size] = at
        at += sum(count(segment, size) for segment in segments)
    return found


def count(segment: Rows, size: int) -> int:
    """Tiles of a segment."""
    _, start, stop = segment
    return -(-(stop - start) // size)


def most_row_tiles(rows: int, segments: int) -> int:
    """Row tiles that a step of so many rows and segments may have."""
    return sum(rows // size + segments for size in SIZES)


def spans(tiles: Sequence[Sequence[int]], most: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Neighbouring row tiles of at most so many rows, and the rows that they have."""
    begin = 0
    for i, tile in enumerate(tiles):
        if i + 1 == len(tiles) or tiles[i + 1][2] - tiles[begin][1] > most:
            yield slice(begin, i + 1), (tiles[begin][1], tile[2])
            begin = i + 1
