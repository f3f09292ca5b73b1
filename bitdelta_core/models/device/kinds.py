"""Which kinds of deltas a step may meet, in each part of the model: what is launched, and so graphs, depend on it.

Layers, embedding and head apart: an 8-bit head must not make every linear of every layer look for eight planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kernels.device import Kinds
from kernels.kept import MAX_BITS

MAX_PLANES = 8
MAX_RANK = 512
"""Of factors in the compute dtype"""
MAX_BYTE_RANK = 4096
"""Of factors of bytes. x A^T of so many takes 16 KiB for a row and member"""
_FAR = 4
"""Times a rank, beyond which too many programs would be launched for nothing"""
_NONE = Kinds()
_ANY = Kinds(
    signs=True, columns=True, planes=MAX_PLANES, rank=MAX_RANK, dense=True, rows=True, compact=MAX_BITS,
    byte_rank=MAX_BYTE_RANK,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepKinds:
    layers: Kinds = _NONE
    embed: Kinds = _NONE
    head: Kinds = _NONE


ANYTHING = StepKinds(_ANY, _ANY, _ANY)
"""What working memory is planned for, and"""
_NO_SIGNS = replace(_ANY, signs=False, columns=False, planes=1)
UNSIGNED = StepKinds(_NO_SIGNS, _NO_SIGNS, _NO_SIGNS)
"""everything else: where signs are unpacked, the base's product is cut into more partial sums without them."""


def union(kinds: Sequence[Kinds]) -> Kinds:
    """The smallest that covers all. Rows are single where they are of all that have signs."""
    signed = [k for k in kinds if k.signs]
    return Kinds(
        signs=bool(signed),
        columns=any(k.columns for k in kinds),
        planes=max((k.planes for k in kinds), default=1),
        rank=max((k.rank for k in kinds), default=0),
        dense=any(k.dense for k in kinds),
        rows=any(k.rows for k in kinds),
        compact=max((k.compact for k in kinds), default=0),
        tall=any(k.compact for k in kinds) and all(k.tall for k in kinds if k.compact),
        single=bool(signed) and all(k.single for k in signed),
        byte_rank=max((k.byte_rank for k in kinds), default=0),
    )


def step_union(kinds: Sequence[StepKinds]) -> StepKinds:
    return StepKinds(*(union([getattr(k, part) for k in kinds]) for part in ("layers", "embed", "head")))


def few_ranks(kinds: StepKinds, prepared: Sequence[StepKinds] = ()) -> StepKinds:
    """Ranks rounded up to powers of two, or to the next that is prepared for if it is not far: kernels are compiled for
    each, and variants have all sorts."""
    parts = ("layers", "embed", "head")
    return StepKinds(*(_rounded(getattr(kinds, part), [getattr(k, part) for k in prepared]) for part in parts))


def _rounded(kinds: Kinds, prepared: Sequence[Kinds]) -> Kinds:
    return replace(
        kinds,
        rank=_next(kinds.rank, [k.rank for k in prepared]),
        byte_rank=_next(kinds.byte_rank, [k.byte_rank for k in prepared]),
    )


def _next(rank: int, prepared: Sequence[int]) -> int:
    if not rank:
        return 0
    power = 1 << (rank - 1).bit_length()
    return min((ready for ready in prepared if power <= ready <= _FAR * power), default=power)


def single(kinds: StepKinds) -> StepKinds:
    """Of a step in which no variant has more than one row; where there are no signs that changes nothing."""
    layers, head = (replace(k, single=k.signs) for k in (kinds.layers, kinds.head))
    return replace(kinds, layers=layers, head=head)
