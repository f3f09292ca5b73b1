"""What kernels that run inside CUDA graphs are given: device tables and buffers at fixed addresses.

A graph is captured once and replayed for every step of its size. So nothing that a kernel is called with may depend
on which variants are resident or how rows belong to them: it reads that from tables, which the engine rewrites between
steps.

- `DeviceDeltas`: the slab, and for every resident variant where the parts of its deltas lie in it.
- `StepRows`: the rows of one step: tokens, positions, KV slots, variants.
- `Planes`, `Partials`: what passes between one linear and its neighbours, so that each launch does a whole stage.

Shapes: T rows, S sequences, M blocks per sequence, G segments, L rows with logits, E entries (the base and every slot),
J targets, C column sets, N outputs, K inputs. All index tensors are int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from kernels.fragments import tiles

UNIT = 256
"""Bytes. Offsets in tables count these, from the start of the slab; every part begins at a multiple of them."""
NONE = -1
"""The offset of a part that is not there."""


class Field(IntEnum):
    """One target's parts of one variant. NONE, or 0 for counts, means that the variant has no such part."""

    SIGN = 0
    """int32 [P, H, B, 32, 4]: see `fragments`"""
    SCALE = 1
    """float32 [P, H * 16], zero in the padding"""
    PLANES = 2
    """P"""
    COL = 3
    """float32 [P, members, B * 256], zero in the padding: what column k of plane p is multiplied with"""
    ZERO = 4
    """float32 [H * 16]: output n gets zero[n] * sum_k x[k] as well. With P = bits, scale[p] = 2^(p-1) scale and
    zero = -scale / 2, planes of a `bits`-wide quantised matrix (q - 2^(bits-1)) * scale are sign planes like any.
    Never together with COL."""
    LORA_A = 5
    """compute dtype [members * rank, K]: every member of a fused target has its own rows, zeros where it has none.
    Byte factors: int8 of that shape, then float32 [members * rank]: what each row's component is multiplied with"""
    LORA_B = 6
    """compute dtype [N, rank], the adapter's scaling folded in. Byte factors: int8 of that shape"""
    RANK = 7
    """rank: a multiple of 16. Byte factors: rank + BYTES"""
    DENSE = 8
    """compute dtype [N, K], the difference itself"""
    ROW_INDEX = 9
    """int32 [R], ascending: whole rows that replace or extend the base's (embedding and head only)"""
    ROW_VALUE = 10
    """compute dtype [R, K]"""
    ROWS = 11
    """R"""
    OUTPUTS = 12
    """The variant's own N where it differs from the base's (a larger vocabulary), else 0"""
    KEPT = 13
    """int32 [H, bits, C, 32, 4]: values of kept inputs alone, see `kept`. Of layers' linears only."""
    INPUTS = 14
    """float32 [H * 16]: half steps, zero in the padding; then uint8 [M, C, 32, 8]: which inputs they are"""
    FORM = 15
    """`kept.Form.code`; 0: nothing is kept"""


BYTES = 1
"""In RANK"""
SEGMENT_ROWS = 8
"""Of one variant that are multiplied at once: as long as reading its signs takes, in sign products"""
FIELDS = 16
"""Width of a table row: a power of two."""


@dataclass(frozen=True, slots=True)
class Target:
    """One fused linear (q, k, v in one) of one layer."""

    index: int
    """j: its place in the tables"""
    outputs: int
    """N of the base"""
    inputs: int
    """K"""
    members: tuple[int, ...] = (0,)
    """First output of each member: (0,), (0, q, q + k), (0, gate). Multiples of 16."""

    def __post_init__(self) -> None:
        assert self.members[0] == 0
        assert all(start % 16 == 0 for start in self.members), f"members begin at {self.members}: not multiples of 16"

    @property
    def tiles(self) -> tuple[int, int]:
        return tiles(self.outputs, self.inputs)


@dataclass(frozen=True, slots=True)
class DeviceDeltas:
    """Entry 0 is the base, entry s + 1 the variant in slot s. The base's entry has vectors and nothing else."""

    slab: torch.Tensor
    """uint8, aligned to UNIT"""
    table_EJF: torch.Tensor
    """[E, J, FIELDS]"""
    vectors_E: torch.Tensor
    """Offset of each entry's block of 1-D parameters (norms, biases), compute dtype; the base's where it has no own"""


@dataclass(frozen=True, slots=True)
class Kinds:
    """Which kinds of deltas a step may meet: kernels for the others are not launched. Part of a graph's key."""

    signs: bool = False
    columns: bool = False
    """Some sign planes have column scales"""
    planes: int = 1
    """Most planes of any"""
    rank: int = 0
    """Highest padded rank of factors in the compute dtype; 0: there are none"""
    dense: bool = False
    rows: bool = False
    compact: int = 0
    """Most bits of a kept value; 0: no variant keeps some inputs only"""
    tall: bool = False
    """Masks of kept values are shared by 64 outputs, of every variant that has any, not by 16"""
    single: bool = False
    """No variant has more than one row: sign products take fewer registers then, and so more programs at a time"""
    byte_rank: int = 0
    """Highest padded rank of factors of bytes; 0: there are none"""

    @property
    def low_rank(self) -> bool:
        return self.rank > 0 or self.byte_rank > 0

    def sets(self, target: Target) -> int:
        """C: column sets that this target's planes need."""
        return self.planes * len(target.members) if self.columns else 1


def segment_table(runs: Sequence[tuple[int, int, int]]) -> list[list[int]]:
    """(entry, start, stop, how many there are) of all runs (entry, start, stop) of variants, SEGMENT_ROWS at a time:
    what programs share out are segments, and many rows of one variant would be few programs' work."""
    own = [
        (entry, first, min(first + SEGMENT_ROWS, stop))
        for entry, start, stop in runs
        if entry > 0
        for first in range(start, stop, SEGMENT_ROWS)
    ]
    return [[*segment, len(own)] for segment in own]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Padding, up to the size of the graph: rows of entry 0 with token 0 at position 0 and KV slot 0 (in block 0, which
    no sequence owns); sequences without rows or context; segments without rows; logit row 0."""

    tokens_T: torch.Tensor
    source_T: torch.Tensor
    """>= 0: take the token from this element of the last step's sampled tokens instead"""
    positions_T: torch.Tensor
    kv_slots_T: torch.Tensor
    """block * block_size + offset"""
    entry_T: torch.Tensor
    query_starts_S1: torch.Tensor
    context_lens_S: torch.Tensor
    """This step's rows included"""
    block_tables_SM: torch.Tensor
    segments_G4: torch.Tensor
    """What `segment_table` makes: the rows of each variant, ascending. Rows of the base are in none."""
    logit_rows_L: torch.Tensor
    logit_segments_G4: torch.Tensor
    """The same over L"""


@dataclass(frozen=True, slots=True)
class Planes:
    """Rows of activations as 16-bit fixed point, cut into bit planes: q = round(x * 32639 / max |x|), two's complement.

    Column set c = p * members + m holds x * col[p, m] where a row's variant has column scales; where it has none, set 0
    alone is written.
    """

    words_CTW: torch.Tensor
    """int32 [C, T, B * 128]: per 256 columns, bit 32w + i of plane p is bit i of word
    ((p % 8) * 4 + w % 4) * 4 + (p // 8) * 2 + w // 4: B operands of two m16n8k256 products, a 16-byte load per lane"""
    scale_CT: torch.Tensor
    """float32: max |x| / 32639"""
    sum_CT: torch.Tensor
    """int32: sum of q"""

    @classmethod
    def empty(cls, sets: int, rows: int, inputs: int, device: torch.device | str) -> Planes:
        width = tiles(1, inputs)[1] * 128
        return cls(
            torch.empty((sets, rows, width), dtype=torch.int32, device=device),
            torch.empty((sets, rows), dtype=torch.float32, device=device),
            torch.empty((sets, rows), dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class Partials:
    """A linear's output before it is summed: y = sum_s base[s] + delta. The consumer sums while it loads."""

    base_STN: torch.Tensor
    """[split, T, N] float32, or [1, T, N] in the compute dtype"""
    delta_TN: torch.Tensor | None
    """float32. Holds something only in rows whose entry is > 0; None: nothing has deltas"""
