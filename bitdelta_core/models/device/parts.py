"""One target's parts of one variant, in the forms that kernels read through the device tables: see `Field`.

Members of a fused target may each have another codec: every form spans the whole target and is zero where it is not
that codec's turn. Planes: as many as the member with most, zero scales for those that another lacks. Low-rank parts:
`factors`. Column scales: ones for members without.

`deltadq` with masks shared by blocks of outputs keeps its compact form (`compact`), of one bit width, group and ratio
in a target. Quantised values, and the odd numbers and zeros of every other `deltadq`, become sign planes, one for each
bit, and a zero term (which cannot stand beside column scales: there `deltadq` members become dense differences).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from bitdelta_core.delta import deltadq
from bitdelta_core.delta.quant import unpack
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import DeltaFormatError
from bitdelta_core.models.device.bitplanes import bit_planes
from bitdelta_core.models.device.compact import Compact, compact_members
from bitdelta_core.models.device.factors import ByteFactors, LowRank, are_bytes, is_low_rank
from bitdelta_core.models.device.kinds import MAX_PLANES, MAX_RANK
from bitdelta_core.models.forms import (
    BaseWeight,
    Member,
    Reader,
    Region,
    Take,
    check_finite,
    spectral_factors,
    whole_rows,
)
from kernels.device import UNIT, Field, Kinds, Target
from kernels.fragments import TILE_COLUMNS, TILE_ROWS, pack, tiles

QUANT_ROWS = 16 * TILE_ROWS
"""Rows of quantised values cut into planes at a time: a multiple of every mask block of deltadq"""


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


def plan(
    target: Target, outputs: int, members: Sequence[Member], dtype: torch.dtype, take: Take, *, compact: bool = False
) -> Iterator[Part]:
    """The parts of one target.

    Args:
        outputs: the variant's own N, at least the base's.
        compact: whether what reads the target takes kept values alone. Embeddings and heads do not.

    Raises:
        DeltaFormatError: more planes or a higher rank than kernels take.
    """
    for member in members:
        _check_limits(member)
    columns = any(member.entry.scale_layout == "row_col" for member in members)
    as_bytes = are_bytes(target, outputs, members, dtype)
    by_form: dict[str, list[Member]] = {}
    kept = compact_members(members) if compact else []
    if kept:
        yield Compact.plan(target, outputs, kept, take)
    for member in (m for m in members if m not in kept):
        by_form.setdefault(_form(member.entry, columns, as_bytes), []).append(member)
    for form, group in by_form.items():
        match form:
            case "planes":
                yield Signs.plan(target, outputs, group, take)
            case "low rank":
                yield LowRank.plan(target, outputs, group, dtype, take)
            case "bytes":
                yield ByteFactors.plan(target, outputs, group, take)
            case "dense":
                yield Dense(tuple(group), take((outputs, target.inputs), dtype))
    for member in members:
        if whole := _whole_rows(member.entry):
            yield Rows(member, take((whole,), torch.int32), take((whole, target.inputs), dtype))


def spectral_entries(parts: Sequence[Part]) -> list[TensorEntry]:
    """In the order in which filling these parts asks for their factors."""
    members = (m for part in parts if isinstance(part, LowRank | ByteFactors | Dense) for m in part.members)
    return [member.entry for member in members if member.entry.codec == "spectral"]


def _form(entry: TensorEntry, columns: bool, as_bytes: bool) -> Literal["planes", "low rank", "bytes", "dense", "rows"]:
    """Args:
    columns: whether a member of the target has column scales.
    as_bytes: whether its `spectral` members stay integers.
    """
    match entry.codec:
        case "bitdelta":
            return "planes"
        case "quant":
            return "planes" if entry.rows else "rows"
        case "deltadq":
            return "dense" if columns else "planes"
        case "spectral":
            return "bytes" if as_bytes else "low rank" if is_low_rank(entry) else "dense"
        case "lora":
            return "low rank"
        case "dense":
            return "dense"
        case "rows":
            return "rows"
        case _:
            raise DeltaFormatError(f"{entry.name}: codec {entry.codec} has no form on a GPU")


def _whole_rows(entry: TensorEntry) -> int:
    match entry.codec:
        case "rows":
            return entry.rows
        case "quant" | "spectral":
            return entry.shape[0] - entry.rows
        case _:
            return 0


def _planes_of(entry: TensorEntry) -> int:
    """deltadq: numbers from -(2^bits - 1) to 2^bits - 1."""
    return {"bitdelta": entry.planes, "quant": entry.bits, "deltadq": entry.bits + 1}[entry.codec]


def _check_limits(member: Member) -> None:
    entry = member.entry
    if entry.codec == "bitdelta" and entry.planes > MAX_PLANES:
        raise DeltaFormatError(f"{entry.name}: {entry.planes} sign planes, at most {MAX_PLANES} on a GPU")
    if entry.codec == "lora" and entry.rank > MAX_RANK:
        raise DeltaFormatError(f"{entry.name}: rank {entry.rank}, at most {MAX_RANK} on a GPU")


@dataclass(frozen=True, slots=True)
class Signs:
    """Sign planes."""

    target: Target
    members: tuple[Member, ...]
    planes: int
    sign: Region
    scale: Region
    col: Region | None
    zero: Region | None

    @classmethod
    def plan(cls, target: Target, outputs: int, members: Sequence[Member], take: Take) -> Signs:
        planes = max(_planes_of(member.entry) for member in members)
        high, wide = tiles(outputs, target.inputs)
        sign = take((planes, high, wide, 32, 4), torch.int32)
        scale = take((planes, high * TILE_ROWS), torch.float32)
        shape = (planes, len(target.members), wide * TILE_COLUMNS)
        col = take(shape, torch.float32) if any(m.entry.scale_layout == "row_col" for m in members) else None
        zero = take((high * TILE_ROWS,), torch.float32) if any(m.entry.codec != "bitdelta" for m in members) else None
        assert col is None or zero is None
        return cls(target, tuple(members), planes, sign, scale, col, zero)

    @property
    def fields(self) -> Mapping[Field, int]:
        fields = {Field.SIGN: _unit(self.sign), Field.SCALE: _unit(self.scale), Field.PLANES: self.planes}
        optional = {Field.COL: self.col, Field.ZERO: self.zero}
        return fields | {field: _unit(region) for field, region in optional.items() if region is not None}

    @property
    def kinds(self) -> Kinds:
        return Kinds(signs=True, columns=self.col is not None, planes=self.planes)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        sign_PHBLc, scale_PN = self.sign.view(buffer), self.scale.view(buffer).zero_()
        zero_N = None if self.zero is None else self.zero.view(buffer).zero_()
        if self._gaps:
            sign_PHBLc.zero_()
        for member in self.members:
            planes, start, rows = _planes_of(member.entry), member.place.start, _coded_rows(member.entry)
            first, high = start // TILE_ROWS, tiles(rows, 1)[0]
            signs = sign_PHBLc[:planes, first : first + high]
            scales = scale_PN[:planes, start : start + rows]
            if member.entry.codec == "bitdelta":
                _fill_signs(reader, member.entry, signs, scales)
            else:
                assert zero_N is not None
                _fill_levels(reader, member.entry, signs, scales, zero_N[start : start + rows])
        if self.col is not None:
            self._fill_columns(reader, self.col.view(buffer))

    @property
    def _gaps(self) -> bool:
        """Whether there are tiles that no member has."""
        high = sum(tiles(_coded_rows(member.entry), 1)[0] for member in self.members)
        uneven = any(_planes_of(member.entry) < self.planes for member in self.members)
        return uneven or high < self.sign.shape[1]

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


def _coded_rows(entry: TensorEntry) -> int:
    """That are stored as differences, from the first on."""
    return entry.rows if entry.codec in ("quant", "spectral") else entry.shape[0]


def _fill_signs(reader: Reader, entry: TensorEntry, sign_PHBLc: torch.Tensor, scale_PN: torch.Tensor) -> None:
    pack(reader.part(entry, "sign"), sign_PHBLc)
    scale_P1 = reader.part(entry, "scale").float()[:, None]
    row_scales = 1.0 if entry.scale_layout == "tensor" else reader.part(entry, "row").float()
    scale_PN.copy_((scale_P1 * row_scales).expand_as(scale_PN))
    check_finite(scale_PN, entry, "scale")


def _fill_levels(
    reader: Reader, entry: TensorEntry, sign_PHBLc: torch.Tensor, scale_PN: torch.Tensor, zero_N: torch.Tensor
) -> None:
    """(q - 2^(P-1)) * step as P planes: see `Field.ZERO`."""
    planes, inputs = sign_PHBLc.shape[0], entry.shape[1]
    levels = reader.part(entry, "q" if entry.codec == "quant" else "code")
    step_N = reader.part(entry, "scale").float() if entry.codec == "quant" else _half_scales(reader, entry)
    check_finite(step_N, entry, "scale")
    scale_PN.copy_(2.0 ** (torch.arange(planes) - 1)[:, None] * step_N)
    zero_N.copy_(step_N / -2)
    for at in range(0, levels.shape[0], QUANT_ROWS):  # what is worked on stays in the cache
        q_Rk, bits = levels[at : at + QUANT_ROWS], entry.bits
        if entry.codec == "deltadq":
            values_RK = _dropout_values(entry, q_Rk, at)
            q_Rk, bits = values_RK.add_(2**entry.bits).view(torch.uint8), 8
        planes_PRk = bit_planes(q_Rk, bits, inputs)[:planes]
        first, high = at // TILE_ROWS, tiles(planes_PRk.shape[1], 1)[0]
        pack(planes_PRk, sign_PHBLc[:, first : first + high])


def _dropout_values(entry: TensorEntry, code_Rk: torch.Tensor, first: int) -> torch.Tensor:
    """Rows first .. first + R of a deltadq matrix, a multiple of its mask blocks on: int8 [R, K] in half scales."""
    rows = code_Rk.shape[0]
    blocks = first // entry.mask_rows, -(-(first + rows) // entry.mask_rows)
    columns_RV = deltadq.kept_columns(entry, *blocks).repeat_interleave(entry.mask_rows, 0)[:rows]
    values_RV = 2 * unpack(code_Rk, entry.bits, entry.kept).to(torch.int8) - (2**entry.bits - 1)
    wide_RK = torch.zeros((rows, entry.padded_columns), dtype=torch.int8)
    return wide_RK.scatter_(1, columns_RV, values_RV)[:, : entry.shape[1]]


def _half_scales(reader: Reader, entry: TensorEntry) -> torch.Tensor:
    return deltadq.half_scales(entry, {part: reader.part(entry, part) for part in entry.parts() if part != "code"})


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
        if sum(_coded_rows(member.entry) for member in self.members) < weight_NK.shape[0]:
            weight_NK.zero_()
        for member in self.members:
            entry, start = member.entry, member.place.start
            difference_NK = _difference(reader, entry, base)
            own = weight_NK[start : start + difference_NK.shape[0]]
            own.copy_(difference_NK)
            check_finite(own, entry, "value" if entry.codec == "dense" else "scale")


def _difference(reader: Reader, entry: TensorEntry, base: BaseWeight) -> torch.Tensor:
    """float32 [N, K]"""
    if entry.codec == "spectral":
        a_rK, b_Nr, scale_r = spectral_factors(reader, entry)
        return (b_Nr.float() * scale_r) @ a_rK.float()
    if entry.codec == "deltadq":
        return deltadq.expand(entry, reader.part(entry, "code")) * _half_scales(reader, entry)[:, None]
    value_NK, base_NK = reader.part(entry, "value").to(torch.float32, copy=True), base(entry.name)
    shared = min(base_NK.shape[0], value_NK.shape[0])
    value_NK[:shared] -= base_NK[:shared].to("cpu", torch.float32)
    return value_NK


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


def _unit(region: Region) -> int:
    assert region.start % UNIT == 0
    return region.start // UNIT
