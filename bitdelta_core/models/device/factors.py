"""Low-rank parts of one target of one variant: factors in the compute dtype, or the integers that `spectral` stores.

Both span the whole target: the highest rank of any member, padded to 16, zeros for members that have less or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.models.device.kinds import MAX_BYTE_RANK, MAX_RANK
from bitdelta_core.models.forms import BaseWeight, Member, Reader, Region, Take, check_finite, spectral_factors
from kernels.device import BYTES, UNIT, Field, Kinds, Target

RANK_STEP = 16


def padded_rank(entry: TensorEntry) -> int:
    return -(-entry.rank // RANK_STEP) * RANK_STEP


def are_bytes(target: Target, outputs: int, members: Sequence[Member], dtype: torch.dtype) -> bool:
    """Whether a target's `spectral` members stay integers. An adapter beside them would need a second low-rank part;
    where most of it were padding, the differences themselves may take less."""
    if any(member.entry.codec == "lora" for member in members):
        return False
    rank = max((padded_rank(m.entry) for m in members if m.entry.codec == "spectral"), default=0)
    values = rank * (len(target.members) * target.inputs + outputs)
    return 0 < rank <= MAX_BYTE_RANK and values < dtype.itemsize * outputs * target.inputs


def is_low_rank(entry: TensorEntry) -> bool:
    """spectral, in the compute dtype: whether its factors take fewer bytes than their product, and kernels take their
    rank."""
    rank = padded_rank(entry)
    return rank <= MAX_RANK and rank * (entry.rows + entry.shape[1]) < entry.rows * entry.shape[1]


@dataclass(frozen=True, slots=True)
class LowRank:
    """In the compute dtype."""

    target: Target
    members: tuple[Member, ...]
    rank: int
    a: Region
    b: Region

    @classmethod
    def plan(cls, target: Target, outputs: int, members: Sequence[Member], dtype: torch.dtype, take: Take) -> LowRank:
        rank = max(padded_rank(member.entry) for member in members)
        a = take((len(target.members), rank, target.inputs), dtype)
        return cls(target, tuple(members), rank, a, take((outputs, rank), dtype))

    @property
    def fields(self) -> Mapping[Field, int]:
        return {Field.LORA_A: self.a.start // UNIT, Field.LORA_B: self.b.start // UNIT, Field.RANK: self.rank}

    @property
    def kinds(self) -> Kinds:
        return Kinds(rank=self.rank)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        a_mrK, b_Nr = self.a.view(buffer).zero_(), self.b.view(buffer).zero_()
        for member in self.members:
            entry, start = member.entry, member.place.start
            values_a, values_b, part_a, part_b = _factors(reader, entry)
            own_a = a_mrK[self.target.members.index(start), : entry.rank]
            own_b = b_Nr[start : start + values_b.shape[0], : entry.rank]
            own_a.copy_(values_a)
            check_finite(own_a, entry, part_a)
            own_b.copy_(values_b)
            check_finite(own_b, entry, part_b)


def _factors(reader: Reader, entry: TensorEntry) -> tuple[torch.Tensor, torch.Tensor, str, str]:
    """A, B with everything that scales them, and the parts to blame for them."""
    if entry.codec == "lora":
        scaled_Nr = reader.part(entry, "lora_B").float() * entry.scaling
        return reader.part(entry, "lora_A"), scaled_Nr, "lora_A", "lora_B"
    a_rK, b_Nr, scale_r = spectral_factors(reader, entry)
    split_r = 2.0 ** (scale_r.log2() / 2).floor()  # a power of two: A keeps its integers exactly, in any dtype
    return a_rK.float() * split_r[:, None], b_Nr.float() * (scale_r / split_r), "scale", "scale"


@dataclass(frozen=True, slots=True)
class ByteFactors:
    """The integers, and the components' scales behind A."""

    target: Target
    members: tuple[Member, ...]
    rank: int
    a: Region
    """int8 [members, rank, K], then float32 [members, rank]"""
    b: Region
    """int8 [N, rank]"""

    @classmethod
    def plan(cls, target: Target, outputs: int, members: Sequence[Member], take: Take) -> ByteFactors:
        rank = max(padded_rank(member.entry) for member in members)
        a = take((len(target.members) * rank * (target.inputs + 4),), torch.int8)
        return cls(target, tuple(members), rank, a, take((outputs, rank), torch.int8))

    @property
    def fields(self) -> Mapping[Field, int]:
        return {Field.LORA_A: self.a.start // UNIT, Field.LORA_B: self.b.start // UNIT, Field.RANK: self.rank + BYTES}

    @property
    def kinds(self) -> Kinds:
        return Kinds(byte_rank=self.rank)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        whole, b_Nr = self.a.view(buffer).zero_(), self.b.view(buffer).zero_()
        shape = (len(self.target.members), self.rank, self.target.inputs)
        a_mrK, scale_mr = whole[: prod(shape)].view(shape), whole[prod(shape) :].view(torch.float32).view(shape[:2])
        for member in self.members:
            entry, start = member.entry, member.place.start
            values_a, values_b, scales = spectral_factors(reader, entry)
            m, r = self.target.members.index(start), entry.rank
            a_mrK[m, :r].copy_(values_a)
            b_Nr[start : start + values_b.shape[0], :r].copy_(values_b)
            scale_mr[m, :r].copy_(scales)
            check_finite(scale_mr[m, :r], entry, "scale")
