"""Steps of prompts which need, between them, nearly every kernel that steps of prompts may: for compiling at a start.

What a linear is made of goes by the rows of a step, by how many variants they are of and by the longest of their
segments; a head by the rows that have logits. These steps were chosen one by one, each time the one that met most of
what random steps needed and none had met, for several shapes of models and kinds of deltas and an H200's settings.
`tests/engine/test_rehearsal.py` counts what random steps need besides; where that grows, because other kernels are
chosen, `tests/engine/launch_harness.py` names steps to add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Step = tuple[tuple[int, ...], int]
"""Rows of each sequence, and how many rows have logits"""
_ALONE = ((2**30, 1), (200, 20), *((rows, 1) for rows in (100, 48, 40, 34, 24, 16, 8)))
"""Rows of one prompt, and those with logits"""
_EQUAL = {
    3: (2, 3, 5, 8, 10, 16, 20, 32, 64),
    8: (40,),
    12: (2, 12),
    24: (3, 48),
    32: (10,),
    64: (5,),
    128: (4,),
    256: (3,),
}
"""Rows of each -> how many"""
_UNEQUAL = ((256, 256, 256, 256, 3, 3), (32, 2), (*[48] * 8, 1024), (*[3] * 16, 1024))
_SCORED = ((12, 3), (12, 6), (48, 3))
"""Rows of each, all of which have logits, and how many"""
STEPS: tuple[Step, ...] = (
    *(((rows,), logits) for rows, logits in _ALONE),
    *(((rows,) * count, 1) for rows, counts in _EQUAL.items() for count in counts),
    *((lengths, 1) for lengths in _UNEQUAL),
    *(((rows,) * count, rows * count) for rows, count in _SCORED),
)


def steps(rows: int, sequences: int, longest: int, logits: int) -> list[Step]:
    """As much of each as there may be: of so many rows and sequences in all, `longest` rows of one sequence, and so
    many rows with logits."""
    cut = (_cut(lengths[:sequences], rows, longest) for lengths, _ in STEPS)
    return list(
        dict.fromkeys((own, min(wanted, logits, sum(own))) for own, (_, wanted) in zip(cut, STEPS, strict=True))
    )


def _cut(lengths: Sequence[int], rows: int, longest: int) -> tuple[int, ...]:
    def taken() -> Iterator[int]:
        room = rows
        for length in lengths:
            yield min(length, longest, room)
            room -= min(length, longest, room)

    return tuple(length for length in taken() if length)
