"""The compute form of each codec: which regions of the slab it takes, how they are filled, what view they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bitdelta_core.delta import deltadq
from bitdelta_core.delta.quant import pack
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.delta.together import Factors, FactorsTogether, Reader
from bitdelta_core.errors import DeltaFormatError
from bitdelta_core.models.parameters import Place
from kernels.delta_linear.torch_dense import quant_values, signs
from kernels.deltas import DenseDelta, Int8Delta, LinearDelta, LowRankDelta, QuantDelta, RowsDelta, SignDelta

BaseWeight = Callable[[str], torch.Tensor]


def spectral_factors(reader: Reader, entry: TensorEntry) -> Factors:
    """Of what a layout fills its parts from."""
    assert isinstance(reader, FactorsTogether), "codes are decoded together with others"
    return reader.factors(entry)


@dataclass(frozen=True, slots=True)
class Region:
    """One tensor inside an extent."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, extent: torch.Tensor) -> torch.Tensor:
        return extent[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


Take = Callable[[Sequence[int], torch.dtype], Region]


@dataclass(frozen=True, slots=True)
class Member:
    """An entry and its place."""

    entry: TensorEntry
    place: Place


class Form(Protocol):
    """One delta of one target."""

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None: ...

    def view(self, extent: torch.Tensor) -> LinearDelta: ...


def plan(
    members: Sequence[Member], dtype: torch.dtype, expand: bool, take: Take
) -> Iterator[tuple[Sequence[Member], Form]]:
    """The forms of one target, each with the members that it holds. RowsDelta comes first, as the ops want it."""
    for group in _groups(members):
        entry = group[0].entry
        match entry.codec:
            case "bitdelta":
                yield group, _Signs.plan(group, dtype, expand, take)
            case "lora":
                yield group, _LowRank.plan(entry, dtype, take)
            case "dense":
                yield group, _Dense(entry, take(entry.shape, dtype))
            case "rows":
                yield group, _Rows.plan(entry, entry.rows, dtype, take)
            case "deltadq":
                yield group, _Dropout.plan(entry, dtype, expand, take)
            case "spectral":
                if entry.shape[0] > entry.rows:
                    yield group, _Rows.plan(entry, entry.shape[0] - entry.rows, dtype, take)
                yield group, _Spectral.plan(entry, dtype, take)
            case "quant":
                if entry.shape[0] > entry.rows:
                    yield group, _Rows.plan(entry, entry.shape[0] - entry.rows, dtype, take)
                if entry.rows:
                    yield group, _Quant.plan(entry, dtype, expand, take)


def spectral_entries(forms: Sequence[Form]) -> list[TensorEntry]:
    """In the order in which filling these forms asks for their factors."""
    return [form.entry for form in forms if isinstance(form, _Spectral)]


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Neighbouring sign matrices without column scales and with equally many planes go together."""
    groups: list[list[Member]] = []
    for member in members:
        if groups and _joins(groups[-1][-1], member):
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def _joins(last: Member, member: Member) -> bool:
    a, b = last.entry, member.entry
    signs_alike = a.codec == b.codec == "bitdelta" and a.planes == b.planes
    no_columns = "row_col" not in (a.scale_layout, b.scale_layout)
    return signs_alike and no_columns and last.place.start + last.place.rows == member.place.start


def whole_rows(reader: Reader, entry: TensorEntry) -> tuple[torch.Tensor, str]:
    """Which rows a `rows` entry, or a `quant` entry beyond its coded ones, stores whole, and the part that has them."""
    if entry.codec == "rows":
        return reader.part(entry, "index"), "value"
    return torch.arange(entry.rows, entry.shape[0]), "extra"


def check_finite(tensor: torch.Tensor, entry: TensorEntry, part: str) -> None:
    """Raise DeltaFormatError unless every value is finite (in the compute dtype)."""
    if not torch.isfinite(tensor).all():
        raise DeltaFormatError(f"{entry.part_name(part)} has a value that is not finite in {tensor.dtype}")


def _copy(region: Region, buffer: torch.Tensor, value: torch.Tensor, entry: TensorEntry, part: str) -> None:
    view = region.view(buffer)
    view.copy_(value)
    if view.is_floating_point():
        check_finite(view, entry, part)


@dataclass(frozen=True, slots=True)
class _Signs:
    """One or several neighbouring sign matrices as one, packed (SignDelta) or one byte per sign (Int8Delta)."""

    members: tuple[Member, ...]
    expand: bool
    sign: Region
    scale: Region
    col: Region | None

    @classmethod
    def plan(cls, members: Sequence[Member], dtype: torch.dtype, expand: bool, take: Take) -> _Signs:
        entry = members[0].entry
        planes, rows, columns = entry.planes, sum(m.place.rows for m in members), entry.shape[1]
        scale_dtype = dtype if expand else torch.float32
        sign = (
            take((planes, rows, columns), torch.int8) if expand else take((planes, rows, -(-columns // 8)), torch.uint8)
        )
        col = take((planes, columns), scale_dtype) if entry.scale_layout == "row_col" else None
        return cls(tuple(members), expand, sign, take((planes, rows), scale_dtype), col)

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        sign_PNx, scale_PN, at = self.sign.view(buffer), self.scale.view(buffer), 0
        for member in self.members:
            entry, rows = member.entry, slice(at, at + member.place.rows)
            packed_PNk = reader.part(entry, "sign")
            for p in range(entry.planes):
                plane = signs(packed_PNk[p], entry.shape[1], torch.int8) if self.expand else packed_PNk[p]
                sign_PNx[p, rows].copy_(plane)
            scale_P1 = reader.part(entry, "scale").float()[:, None]
            row_scales = 1.0 if entry.scale_layout == "tensor" else reader.part(entry, "row").float()
            scale_PN[:, rows] = scale_P1 * row_scales
            check_finite(scale_PN[:, rows], entry, "scale")
            at = rows.stop
        if self.col is not None:
            _copy(self.col, buffer, reader.part(self.members[0].entry, "col"), self.members[0].entry, "col")

    def view(self, extent: torch.Tensor) -> LinearDelta:
        sign, scale = self.sign.view(extent), self.scale.view(extent)
        col = None if self.col is None else self.col.view(extent)
        if self.expand:
            return Int8Delta(sign, scale, col)
        return SignDelta(sign, scale, col, self.members[0].entry.shape[1])


@dataclass(frozen=True, slots=True)
class _LowRank:
    entry: TensorEntry
    a: Region
    b: Region

    @classmethod
    def plan(cls, entry: TensorEntry, dtype: torch.dtype, take: Take) -> _LowRank:
        parts = entry.parts()
        return cls(entry, take(parts["lora_A"][1], dtype), take(parts["lora_B"][1], dtype))

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        _copy(self.a, buffer, reader.part(self.entry, "lora_A"), self.entry, "lora_A")
        scaled = reader.part(self.entry, "lora_B").float() * self.entry.scaling
        _copy(self.b, buffer, scaled, self.entry, "lora_B")

    def view(self, extent: torch.Tensor) -> LinearDelta:
        return LowRankDelta(self.a.view(extent), self.b.view(extent))


@dataclass(frozen=True, slots=True)
class _Dense:
    """The difference; rows beyond the base's stay whole, the base counting as zero there."""

    entry: TensorEntry
    weight: Region

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        value, base_NK = reader.part(self.entry, "value").to(torch.float32, copy=True), base(self.entry.name)
        shared = min(base_NK.shape[0], value.shape[0])
        value[:shared] -= base_NK[:shared].to("cpu", torch.float32)
        _copy(self.weight, buffer, value, self.entry, "value")

    def view(self, extent: torch.Tensor) -> LinearDelta:
        return DenseDelta(self.weight.view(extent))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Stored rows with their indices, or the whole rows that follow the quantised ones."""

    entry: TensorEntry
    index: Region
    value: Region

    @classmethod
    def plan(cls, entry: TensorEntry, rows: int, dtype: torch.dtype, take: Take) -> _Rows:
        return cls(entry, take((rows,), torch.int64), take((rows, entry.shape[1]), dtype))

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        index, part = whole_rows(reader, self.entry)
        _copy(self.index, buffer, index, self.entry, "index")
        _copy(self.value, buffer, reader.part(self.entry, part), self.entry, part)

    def view(self, extent: torch.Tensor) -> LinearDelta:
        return RowsDelta(self.index.view(extent), self.value.view(extent))


@dataclass(frozen=True, slots=True)
class _Quant:
    """The quantised rows, packed (QuantDelta) or one byte per value (Int8Delta)."""

    entry: TensorEntry
    expand: bool
    q: Region
    scale: Region

    @classmethod
    def plan(cls, entry: TensorEntry, dtype: torch.dtype, expand: bool, take: Take) -> _Quant:
        if expand:
            return cls(entry, True, take((1, entry.rows, entry.shape[1]), torch.int8), take((1, entry.rows), dtype))
        stored = entry.parts()["q"]
        return cls(entry, False, take(stored[1], stored[0]), take((entry.rows,), torch.float32))

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        q_Nk = reader.part(self.entry, "q")
        if self.expand:
            q_Nk = quant_values(q_Nk, self.entry.bits, self.entry.shape[1], torch.int8)[None]
        _copy(self.q, buffer, q_Nk, self.entry, "q")
        _copy(self.scale, buffer, reader.part(self.entry, "scale"), self.entry, "scale")

    def view(self, extent: torch.Tensor) -> LinearDelta:
        if self.expand:
            return Int8Delta(self.q.view(extent), self.scale.view(extent), None)
        return QuantDelta(self.q.view(extent), self.scale.view(extent), self.entry.bits, self.entry.shape[1])


@dataclass(frozen=True, slots=True)
class _Dropout:
    """Kept values among zeros: one byte per weight (Int8Delta), or 2, 4 or 8 bits per weight (QuantDelta)."""

    entry: TensorEntry
    expand: bool
    q: Region
    scale: Region

    @classmethod
    def plan(cls, entry: TensorEntry, dtype: torch.dtype, expand: bool, take: Take) -> _Dropout:
        rows, columns = entry.shape
        if expand:
            return cls(entry, True, take((1, rows, columns), torch.int8), take((1, rows), dtype))
        packed = (rows, -(-columns * _dropout_bits(entry) // 8))
        return cls(entry, False, take(packed, torch.uint8), take((rows,), torch.float32))

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        values_NK = deltadq.expand(self.entry, reader.part(self.entry, "code"))
        if self.expand:
            _copy(self.q, buffer, values_NK[None], self.entry, "code")
        else:
            bits = _dropout_bits(self.entry)
            codes_NK = (values_NK.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
            _copy(self.q, buffer, pack(codes_NK, bits), self.entry, "code")
        scales = {part: reader.part(self.entry, part) for part in self.entry.parts() if part != "code"}
        _copy(self.scale, buffer, deltadq.half_scales(self.entry, scales), self.entry, "scale")

    def view(self, extent: torch.Tensor) -> LinearDelta:
        if self.expand:
            return Int8Delta(self.q.view(extent), self.scale.view(extent), None)
        return QuantDelta(self.q.view(extent), self.scale.view(extent), _dropout_bits(self.entry), self.entry.shape[1])


def _dropout_bits(entry: TensorEntry) -> int:
    """Odd numbers up to 2^bits - 1 and zero, as signed integers."""
    return 2 * entry.bits


@dataclass(frozen=True, slots=True)
class _Spectral:
    """Decoded factors (LowRankDelta), or their product (DenseDelta) where that takes fewer bytes."""

    entry: TensorEntry
    regions: tuple[Region, ...]
    """A [r, K] and B [N, r], or the product [N, K]."""

    @classmethod
    def plan(cls, entry: TensorEntry, dtype: torch.dtype, take: Take) -> _Spectral:
        rows, columns, rank = entry.rows, entry.shape[1], entry.rank
        if rank * (rows + columns) < rows * columns:
            return cls(entry, (take((rank, columns), dtype), take((rows, rank), dtype)))
        return cls(entry, (take((rows, columns), dtype),))

    def fill(self, reader: Reader, buffer: torch.Tensor, base: BaseWeight) -> None:
        for region, value in zip(self.regions, self._values(*spectral_factors(reader, self.entry)), strict=True):
            _copy(region, buffer, value, self.entry, "scale")

    def _values(self, a_rK: torch.Tensor, b_Nr: torch.Tensor, scale_r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(self.regions) == 1:
            return ((b_Nr.float() * scale_r) @ a_rK.float(),)
        split_r = (
            2.0 ** (scale_r.abs().clamp_min(1e-30).log2() / 2).floor()
        )  # a power of two: A keeps its integers exactly, in any dtype
        return a_rK.float() * split_r[:, None], b_Nr.float() * (scale_r / split_r)

    def view(self, extent: torch.Tensor) -> LinearDelta:
        tensors = [region.view(extent) for region in self.regions]
        return LowRankDelta(*tensors) if len(tensors) == 2 else DenseDelta(*tensors)
