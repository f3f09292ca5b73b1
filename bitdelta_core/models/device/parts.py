"""One target's parts of one variant, in the forms that kernels read through the device tables: see `Field`.

Members of a fused target may each have another codec: every form spans the whole target and is zero where it is not
that codec's turn. Signs: as many planes as the member with most, zero scales for the planes that another lacks.
Low-rank: the highest rank, padded to 16. Column scales: ones for members without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bitdelta_core.errors import DeltaFormatError
from bitdelta_core.models.device.bitplanes import bit_planes
from bitdelta_core.models.device.kinds import MAX_PLANES, MAX_RANK
from bitdelta_core.models.forms import BaseWeight, Member, Reader, Region, Take, check_finite, whole_rows
from kernels.device import UNIT, Field, Kinds, Target
from kernels.fragments import TILE_COLUMNS, TILE_ROWS, pack, tiles

RANK_STEP = 16
QUANT_ROWS = 16 * TILE_ROWS


class Part(Protocol):
    """Regions of an extent, and what the table says of them."""

    @property
    def fields(self) -> Mapping[Field, int]:
        """Offsets in UNITs from the start of the extent, and counts."""
        ...

    @property
    def kinds(self) -> Kinds: ...

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        """Write every byte of the regions."""
        ...


def plan(target: Target, outputs: int, members: Sequence[Member], dtype: torch.dtype, take: Take) -> Iterator[Part]:
    """The parts of one target.

    Args:
        outputs: the variant's own N, at least the base's.

    Raises:
        DeltaFormatError: more planes or a higher rank than kernels take.
    """
    for member in members:
        _check_limits(member)
    by_codec: dict[str, list[Member]] = {}
    for member in members:
        by_codec.setdefault(member.entry.codec, []).append(member)
    for codec, group in by_codec.items():
        match codec:
            case "bitdelta":
                yield Signs.plan(target, outputs, group, take)
            case "lora":
                yield LowRank.plan(target, outputs, group, dtype, take)
            case "dense":
                yield Dense(tuple(group), take((outputs, target.inputs), dtype))
            case "quant" | "rows":
                yield from _table_parts(target, outputs, group[0], dtype, take)


def _check_limits(member: Member) -> None:
    entry = member.entry
    if entry.codec == "bitdelta" and entry.planes > MAX_PLANES:
        raise DeltaFormatError(f"{entry.name}: {entry.planes} sign planes, at most {MAX_PLANES} on a GPU")
    if entry.codec == "lora" and entry.rank > MAX_RANK:
        raise DeltaFormatError(f"{entry.name}: rank {entry.rank}, at most {MAX_RANK} on a GPU")


def _table_parts(target: Target, outputs: int, member: Member, dtype: torch.dtype, take: Take) -> Iterator[Part]:
    """Of an embedding or a head."""
    entry = member.entry
    if entry.codec == "quant" and entry.rows:
        yield Quant.plan(target, outputs, member, take)
    whole = entry.rows if entry.codec == "rows" else entry.shape[0] - entry.rows
    if whole:
        yield Rows(member, take((whole,), torch.int32), take((whole, target.inputs), dtype))


@dataclass(frozen=True, slots=True)
class Signs:
    """Sign planes."""

    target: Target
    members: tuple[Member, ...]
    planes: int
    sign: Region
    scale: Region
    col: Region | None

    @classmethod
    def plan(cls, target: Target, outputs: int, members: Sequence[Member], take: Take) -> Signs:
        planes = max(member.entry.planes for member in members)
        sign, scale = _take_planes(target, outputs, planes, take)
        columns = any(member.entry.scale_layout == "row_col" for member in members)
        width = target.tiles[1] * TILE_COLUMNS
        col = take((planes, len(target.members), width), torch.float32) if columns else None
        return cls(target, tuple(members), planes, sign, scale, col)

    @property
    def fields(self) -> Mapping[Field, int]:
        fields = {Field.SIGN: _unit(self.sign), Field.SCALE: _unit(self.scale), Field.PLANES: self.planes}
        return fields if self.col is None else {**fields, Field.COL: _unit(self.col)}

    @property
    def kinds(self) -> Kinds:
        return Kinds(signs=True, columns=self.col is not None, planes=self.planes)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        sign_PHBLc, scale_PN = self.sign.view(buffer), self.scale.view(buffer)
        scale_PN.zero_()
        if sum(m.place.rows for m in self.members) < self.target.outputs or self._uneven:
            sign_PHBLc.zero_()
        for member in self.members:
            self._fill_member(reader, member, sign_PHBLc, scale_PN)
        if self.col is not None:
            self._fill_columns(reader, self.col.view(buffer))

    @property
    def _uneven(self) -> bool:
        return any(member.entry.planes < self.planes for member in self.members)

    def _fill_member(self, reader: Reader, member: Member, sign_PHBLc: torch.Tensor, scale_PN: torch.Tensor) -> None:
        entry, start, rows = member.entry, member.place.start, member.place.rows
        first, high = start // TILE_ROWS, tiles(rows, 1)[0]
        pack(reader.part(entry, "sign"), sign_PHBLc[: entry.planes, first : first + high])
        scale_P1 = reader.part(entry, "scale").float()[:, None]
        row_scales = 1.0 if entry.scale_layout == "tensor" else reader.part(entry, "row").float()
        scales = scale_PN[: entry.planes, start : start + rows]
        scales.copy_((scale_P1 * row_scales).expand_as(scales))
        check_finite(scales, entry, "scale")

    def _fill_columns(self, reader: Reader, col_PmK: torch.Tensor) -> None:
        inputs = self.target.inputs
        col_PmK.zero_()
        col_PmK[..., :inputs] = 1.0
        for member in self.members:
            entry, m = member.entry, self.target.members.index(member.place.start)
            if entry.scale_layout == "row_col":
                own = col_PmK[: entry.planes, m, :inputs]
                own.copy_(reader.part(entry, "col"))
                check_finite(own, entry, "col")


@dataclass(frozen=True, slots=True)
class Quant:
    """Quantised rows as one sign plane for each bit: see `Field.ZERO`."""

    member: Member
    sign: Region
    scale: Region
    zero: Region

    @classmethod
    def plan(cls, target: Target, outputs: int, member: Member, take: Take) -> Quant:
        sign, scale = _take_planes(target, outputs, member.entry.bits, take)
        return cls(member, sign, scale, take(scale.shape[1:], torch.float32))

    @property
    def fields(self) -> Mapping[Field, int]:
        return {
            Field.SIGN: _unit(self.sign),
            Field.SCALE: _unit(self.scale),
            Field.PLANES: self.member.entry.bits,
            Field.ZERO: _unit(self.zero),
        }

    @property
    def kinds(self) -> Kinds:
        return Kinds(signs=True, planes=self.member.entry.bits)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        entry = self.member.entry
        sign_PHBLc, scale_PN, zero_N = (r.view(buffer) for r in (self.sign, self.scale, self.zero))
        high = tiles(entry.rows, 1)[0]
        sign_PHBLc[:, high:].zero_()
        _pack_bits(reader.part(entry, "q"), entry.bits, entry.shape[1], sign_PHBLc[:, :high])
        scale_N = reader.part(entry, "scale").float()
        check_finite(scale_N, entry, "scale")
        weight_P1 = 2.0 ** (torch.arange(entry.bits) - 1)[:, None]
        scale_PN.zero_()
        scale_PN[:, : entry.rows] = weight_P1 * scale_N
        zero_N.zero_()
        zero_N[: entry.rows] = scale_N / -2


def _pack_bits(q_Nk: torch.Tensor, bits: int, inputs: int, out_PHBLc: torch.Tensor) -> None:
    """Some tile rows at a time, so that what is worked on stays in the cache."""
    for at in range(0, q_Nk.shape[0], QUANT_ROWS):
        planes_PNk = bit_planes(q_Nk[at : at + QUANT_ROWS], bits, inputs)
        first, high = at // TILE_ROWS, tiles(planes_PNk.shape[1], 1)[0]
        pack(planes_PNk, out_PHBLc[:, first : first + high])


@dataclass(frozen=True, slots=True)
class LowRank:
    target: Target
    members: tuple[Member, ...]
    rank: int
    a: Region
    b: Region

    @classmethod
    def plan(cls, target: Target, outputs: int, members: Sequence[Member], dtype: torch.dtype, take: Take) -> LowRank:
        rank = -(-max(member.entry.rank for member in members) // RANK_STEP) * RANK_STEP
        a = take((len(target.members), rank, target.inputs), dtype)
        return cls(target, tuple(members), rank, a, take((outputs, rank), dtype))

    @property
    def fields(self) -> Mapping[Field, int]:
        return {Field.LORA_A: _unit(self.a), Field.LORA_B: _unit(self.b), Field.RANK: self.rank}

    @property
    def kinds(self) -> Kinds:
        return Kinds(rank=self.rank)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        a_mrK, b_Nr = self.a.view(buffer).zero_(), self.b.view(buffer).zero_()
        for member in self.members:
            entry, start, rows = member.entry, member.place.start, member.place.rows
            own_a = a_mrK[self.target.members.index(start), : entry.rank]
            own_b = b_Nr[start : start + rows, : entry.rank]
            own_a.copy_(reader.part(entry, "lora_A"))
            check_finite(own_a, entry, "lora_A")
            own_b.copy_(reader.part(entry, "lora_B").float() * entry.scaling)
            check_finite(own_b, entry, "lora_B")


@dataclass(frozen=True, slots=True)
class Dense:
    """Differences; rows beyond the base's stay whole, the base counting as zero there."""

    members: tuple[Member, ...]
    weight: Region

    @property
    def fields(self) -> Mapping[Field, int]:
        return {Field.DENSE: _unit(self.weight)}

    @property
    def kinds(self) -> Kinds:
        return Kinds(dense=True)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        weight_NK = self.weight.view(buffer)
        if sum(m.place.rows for m in self.members) < weight_NK.shape[0]:
            weight_NK.zero_()
        for member in self.members:
            entry, base_NK = member.entry, base(member.entry.name)
            value = reader.part(entry, "value").to(torch.float32, copy=True)
            shared = min(base_NK.shape[0], value.shape[0])
            value[:shared] -= base_NK[:shared].to("cpu", torch.float32)
            own = weight_NK[member.place.start : member.place.start + value.shape[0]]
            own.copy_(value)
            check_finite(own, entry, "value")


@dataclass(frozen=True, slots=True)
class Rows:
    """Stored rows with their indices, or the whole rows that follow the quantised ones."""

    member: Member
    index: Region
    value: Region

    @property
    def fields(self) -> Mapping[Field, int]:
        return {
            Field.ROW_INDEX: _unit(self.index),
            Field.ROW_VALUE: _unit(self.value),
            Field.ROWS: self.index.shape[0],
        }

    @property
    def kinds(self) -> Kinds:
        return Kinds(rows=True)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        entry, value_RK = self.member.entry, self.value.view(buffer)
        index, part = whole_rows(reader, entry)
        self.index.view(buffer).copy_(index)
        value_RK.copy_(reader.part(entry, part))
        check_finite(value_RK, entry, part)


def _take_planes(target: Target, outputs: int, planes: int, take: Take) -> tuple[Region, Region]:
    high, wide = tiles(outputs, target.inputs)
    return take((planes, high, wide, 32, 4), torch.int32), take((planes, high * TILE_ROWS), torch.float32)


def _unit(region: Region) -> int:
    assert region.start % UNIT == 0
    return region.start // UNIT
