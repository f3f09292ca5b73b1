"""Steps of prompts that need, between them, every kernel that byte factors may: for compiling before they are needed.

Settings of byte factors go by rows, by how many segments they are in and by the longest (`low_rank_choice.byte_rule`);
each is a kernel of its own. Not each is found: of thousands of random steps in the shapes of a 7B, all but a few were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from kernels.delta_linear import low_rank_choice
from kernels.delta_linear.row_tiles import ROWS, cut, spans
from kernels.device import Target

_COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
_LENGTHS = (4, 8, 16, 32, 64, 128, 192, 256)
Launch = tuple[object, ...]


def mixes(
    targets: Sequence[Target],
    byte_rank: int,
    rows: int,
    sequences: int,
    device: torch.device,
    known: Iterable[Sequence[int]] = (),
) -> list[list[int]]:
    """Rows of each segment of steps, each of which needs kernels that those before it and `known` steps do not."""
    seen = {launch for lengths in known for launch in launches(targets, byte_rank, lengths, device)}
    found = []
    for lengths in _candidates():
        if len(lengths) <= sequences and sum(lengths) <= rows:
            needed = launches(targets, byte_rank, lengths, device)
            if not needed <= seen:
                found.append(lengths)
                seen |= needed
    return found


def _candidates() -> Iterator[list[int]]:
    """Equal segments; one long and many short; and such as leave a rest of the rows that are computed at once."""
    for count in _COUNTS:
        for length in _LENGTHS:
            yield [length] * count
            yield [length] + [1] * (count - 1)
            yield [length] * count + [low_rank_choice.BYTE_ROWS]
            yield [ROWS] * (low_rank_choice.BYTE_ROWS // ROWS) + [length] * count


def launches(targets: Sequence[Target], byte_rank: int, lengths: Sequence[int], device: torch.device) -> set[Launch]:
    """What a step with segments of so many rows is compiled by."""
    segments = [(1, start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]
    longest, found = min(ROWS, max(lengths)), set()
    for tiles, (start, stop) in spans(cut(segments, ROWS), low_rank_choice.BYTE_ROWS):
        for target in targets:
            rank = low_rank_choice.byte_rank(target, byte_rank)
            count = tiles.stop - tiles.start
            config = low_rank_choice.choose_bytes(target, stop - start, count, rank, device, longest=longest)
            found.add((target.inputs, len(target.members), rank, replace(config, blocks=1, strips=1)))
    return found
