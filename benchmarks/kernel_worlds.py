"""Targets, deltas and batches at the sizes of real models, made on the device: what the kernel benchmarks run on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import gpu_timing
import torch
from synthetic import Shape

from kernels import fragments
from kernels.delta_linear import table_reference
from kernels.device import BYTES, FIELDS, NONE, UNIT, DeviceDeltas, Field, Kinds, Target, segment_table
from kernels.kept import Form, pack_inputs

Mix = Literal["distinct", "identical", "uniform", "zipf", "base"]


def targets_of(shape: Shape) -> dict[str, Target]:
    """The linears of one layer, and the head."""
    head_dim = shape.hidden // shape.heads
    q, kv = shape.heads * head_dim, shape.kv_heads * head_dim
    made = {
        "qkv": Target(0, q + 2 * kv, shape.hidden, (0, q, q + kv)),
        "o": Target(0, shape.hidden, q),
        "gate_up": Target(0, 2 * shape.inner, shape.hidden, (0, shape.inner)),
        "down": Target(0, shape.hidden, shape.inner),
        "head": Target(0, shape.vocabulary, shape.hidden),
    }
    return {name: replace(target, index=0) for name, target in made.items()}


@dataclass(frozen=True)
class Parts:
    """What every variant of a bulk has for a target."""

    planes: int = 0
    columns: bool = False
    rank: int = 0
    dense: bool = False
    kept: Form | None = None
    byte_rank: int = 0

    def kinds(self) -> Kinds:
        return Kinds(
            signs=self.planes > 0,
            columns=self.columns,
            planes=max(1, self.planes),
            rank=-(-self.rank // 16) * 16,
            dense=self.dense,
            compact=self.kept.bits if self.kept else 0,
            tall=self.kept is not None and self.kept.mask_rows == 64,
            byte_rank=-(-self.byte_rank // 16) * 16,
        )

    @property
    def rank_field(self) -> int:
        kinds = self.kinds()
        return kinds.byte_rank + BYTES if kinds.byte_rank else kinds.rank


@dataclass
class Bulk:
    """Many variants with equal parts; entry e's parts begin at (e - 1) * entry_bytes."""

    target: Target
    parts: Parts
    deltas: DeviceDeltas
    entries: int
    bytes_per_entry: int
    """Without the padding between parts"""
    dtype: torch.dtype

    def matrix(self, entry: int) -> torch.Tensor:
        """D of one entry, float64 [N, K]."""
        row = self.deltas.table_EJF[entry, 0].tolist()
        n, k = self.target.outputs, self.target.inputs
        total = torch.zeros(n, k, dtype=torch.float64, device=self.deltas.slab.device)
        members = [*self.target.members, n]
        if self.parts.planes:
            high, wide = self.target.tiles
            packed = self._part(row[Field.SIGN], (self.parts.planes, high, wide, 32, 4), torch.int32)
            scale = self._part(row[Field.SCALE], (self.parts.planes, high * 16), torch.float32)
            bits = fragments.unpack(packed, n, k)
            for p in range(self.parts.planes):
                unpacked = (bits[p, :, :, None] >> torch.arange(8, device=bits.device)) & 1
                plane = (unpacked.flatten(1)[:, :k].double() * 2 - 1) * scale[p, :n, None]
                if self.parts.columns:
                    col = self._part(row[Field.COL], (self.parts.planes, len(members) - 1, wide * 256), torch.float32)
                    for m, (start, stop) in enumerate(itertools.pairwise(members)):
                        plane[start:stop] *= col[p, m, :k]
                total += plane
        if self.parts.rank:
            rank = row[Field.RANK]
            a = self._part(row[Field.LORA_A], (len(members) - 1, rank, k), self.dtype).double()
            b = self._part(row[Field.LORA_B], (n, rank), self.dtype).double()
            for m, (start, stop) in enumerate(itertools.pairwise(members)):
                total[start:stop] += b[start:stop] @ a[m]
        if self.parts.dense:
            total += self._part(row[Field.DENSE], (n, k), self.dtype)
        if self.parts.kept:
            total += table_reference.compact(self.deltas, self.target, entry)
        if self.parts.byte_rank:
            factors = table_reference.low_rank(self.deltas, self.target, entry, self.dtype)
            assert factors is not None
            total += factors
        return total

    def _part(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return _view(self.deltas.slab, offset, shape, dtype)


def _view(slab: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    count = dtype.itemsize
    for side in shape:
        count *= side
    return slab[offset * UNIT : offset * UNIT + count].view(dtype).view(*shape)


def bulk(target: Target, parts: Parts, entries: int, dtype: torch.dtype) -> Bulk:
    """`entries` variants of random numbers."""
    shapes = _shapes(target, parts, dtype)
    sizes = {field: _nbytes(shape, kind) for field, (shape, kind) in shapes.items()}
    units = {field: -(-size // UNIT) for field, size in sizes.items()}
    device, per_entry = gpu_timing.device(), sum(units.values())
    slab = torch.empty(max(1, per_entry * entries) * UNIT, dtype=torch.uint8, device=device)
    table = torch.full((entries + 1, 1, FIELDS), NONE, dtype=torch.int32)
    table[:, :, [Field.PLANES, Field.RANK, Field.ROWS, Field.OUTPUTS, Field.FORM]] = 0
    for e in range(1, entries + 1):
        at = (e - 1) * per_entry
        for field, (shape, kind) in shapes.items():
            table[e, 0, field] = at
            _fill(_view(slab, at, shape, kind), field, target, parts)
            at += units[field]
        table[e, 0, Field.PLANES], table[e, 0, Field.RANK] = parts.planes, parts.rank_field
        table[e, 0, Field.FORM] = parts.kept.code if parts.kept else 0
    vectors = torch.full((entries + 1,), NONE, dtype=torch.int32, device=device)
    deltas = DeviceDeltas(slab, table.to(device), vectors)
    return Bulk(target, parts, deltas, entries, sum(sizes.values()), dtype)


def _shapes(target: Target, parts: Parts, dtype: torch.dtype) -> dict[Field, tuple[tuple[int, ...], torch.dtype]]:
    high, wide = target.tiles
    n, k, members, rank = target.outputs, target.inputs, len(target.members), parts.kinds().rank
    found: dict[Field, tuple[tuple[int, ...], torch.dtype]] = {}
    if parts.planes:
        found[Field.SIGN] = ((parts.planes, high, wide, 32, 4), torch.int32)
        found[Field.SCALE] = ((parts.planes, high * 16), torch.float32)
    if parts.columns:
        found[Field.COL] = ((parts.planes, members, wide * 256), torch.float32)
    if parts.rank:
        found[Field.LORA_A] = ((members * rank, k), dtype)
        found[Field.LORA_B] = ((n, rank), dtype)
    if small := parts.kinds().byte_rank:
        found[Field.LORA_A] = ((members * small * (k + 4),), torch.int8)
        found[Field.LORA_B] = ((n, small), torch.int8)
    if parts.dense:
        found[Field.DENSE] = ((n, k), dtype)
    if parts.kept:
        found[Field.KEPT] = (parts.kept.tile_shape(n, k), torch.int32)
        found[Field.INPUTS] = ((high * 64 + prod(parts.kept.input_shape(n, k)),), torch.uint8)
    return found


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count


def _fill(part: torch.Tensor, field: Field, target: Target, parts: Parts) -> None:
    """Numbers of a size that shows: a delta's outputs are about a tenth of the base's."""
    match field:
        case Field.INPUTS:
            assert parts.kept is not None
            _fill_inputs(part, target, parts.kept)
        case Field.LORA_A if parts.byte_rank:
            values = len(target.members) * parts.kinds().byte_rank * target.inputs
            part[:values].random_(-127, 128)
            part[values:].view(torch.float32).uniform_(1e-7, 5e-7).div_(parts.byte_rank**0.5)
        case Field.LORA_B if parts.byte_rank:
            part.random_(-127, 128)
        case Field.SIGN | Field.KEPT:
            part.random_(-(2**31), 2**31 - 1)
        case Field.COL:
            part.uniform_(0.25, 1.75)
        case Field.SCALE:
            part.uniform_(0.001, 0.01)
        case _:
            part.normal_(0.0, 0.03)


def _fill_inputs(part: torch.Tensor, target: Target, form: Form) -> None:
    """Half steps, and places in their groups of which none comes twice."""
    floats, values = 64 * target.tiles[0], form.values(target.inputs)
    part[:floats].view(torch.float32).uniform_(0.001, 0.01)
    blocks, groups = form.blocks(target.outputs), values // form.kept
    order = torch.rand(blocks, groups, form.group, device=part.device).argsort(2)[..., : form.kept]
    pack_inputs(order.flatten(1), form, part[floats:].view(form.input_shape(target.outputs, target.inputs)))


@dataclass(frozen=True)
class Rows:
    """Which entry each row has."""

    entry_T: torch.Tensor
    segments_G4: torch.Tensor
    segments: tuple[tuple[int, int, int], ...]
    """(entry, start, stop), the base's too"""


def rows_of(entries: Sequence[int]) -> Rows:
    """Rows in the order of their entries."""
    ordered = sorted(entries)
    starts = {e: ordered.index(e) for e in dict.fromkeys(ordered)}
    segments = tuple((e, start, start + ordered.count(e)) for e, start in starts.items())
    own = segment_table(segments) or [[0, 0, 0, 0]]
    device = gpu_timing.device()
    return Rows(
        torch.tensor(ordered, dtype=torch.int32, device=device),
        torch.tensor(own, dtype=torch.int32, device=device),
        segments,
    )


def batches(mix: Mix, rows: int, variants: int, pool: int, count: int) -> list[Rows]:
    """`count` batches of `rows` rows over `variants` variants, as different as a pool of `pool` entries allows."""
    made = []
    for i in range(count):
        chosen = [(i * variants + v) % pool + 1 for v in range(variants)]
        made.append(rows_of(_spread(mix, rows, chosen)))
    return made


def _spread(mix: Mix, rows: int, chosen: list[int]) -> list[int]:
    match mix:
        case "base":
            return [0] * rows
        case "zipf":
            weights = [1 / (i + 1) for i in range(len(chosen))]
            counts = [max(1, round(rows * w / sum(weights))) for w in weights]
            return [e for e, n in zip(chosen, counts, strict=True) for _ in range(n)][:rows]
        case _:
            return [chosen[i * len(chosen) // rows] for i in range(rows)]
