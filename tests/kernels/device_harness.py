"""Random slabs, tables and batches for the kernels that read deltas through device tables, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kernels import fragments, kept
from kernels.delta_linear.reference import matrix
from kernels.deltas import DenseDelta, LinearDelta, LowRankDelta, RowsDelta, SignDelta
from kernels.device import BYTES, FIELDS, NONE, UNIT, DeviceDeltas, Field, Kinds, Target, segment_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32, torch.float16]
"""The interpreter's bfloat16 products are wrong, so a CPU tests other dtypes."""
POISON = 0xFF
"""Every byte of the slab outside the parts: NaN in every floating dtype, -1 in every integer."""

Spec = dict[str, Any]
"""What one entry has for one target: signs=P, col=True, quant=bits, rank=r or bytes=r, members=(1,) (of the low-rank
part: those that have one), dense=True, kept=Form, rows=R, extra=n (outputs beyond the base's)."""
ENTRIES: dict[str, Spec] = {
    "signs": {"signs": 1},
    "two planes": {"signs": 2},
    "columns": {"signs": 1, "col": True},
    "two planes, columns": {"signs": 2, "col": True},
    "rank 4": {"rank": 4},
    "rank 40": {"rank": 40},
    "dense": {"dense": True},
    "nothing": {},
    "all": {"signs": 1, "rank": 8, "dense": True},
}


class SlabWriter:
    """Appends parts at multiples of UNIT, with poison between them."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._at = 0

    def add(self, tensor: torch.Tensor) -> int:
        """Returns the offset in UNITs."""
        data = tensor.contiguous().flatten().view(torch.uint8)
        room = -(-data.numel() // UNIT) * UNIT + UNIT
        padded = torch.full((room,), POISON, dtype=torch.uint8)
        padded[: data.numel()] = data
        self._parts.append(padded)
        self._at += room
        return (self._at - room) // UNIT

    def finish(self) -> torch.Tensor:
        return torch.cat([*self._parts, torch.full((UNIT,), POISON, dtype=torch.uint8)]).to(DEVICE)


@dataclass
class World:
    """Targets, deltas of every entry, and their float32 meaning (on the CPU)."""

    targets: list[Target]
    dtype: torch.dtype
    deltas: DeviceDeltas
    meaning: dict[tuple[int, int], list[LinearDelta]] = field(default_factory=dict)
    """(entry, target index) -> deltas"""
    vectors_EV: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Each entry's 1-D parameters"""

    def kinds(self) -> Kinds:
        """The smallest that covers every entry."""
        table = self.deltas.table_EJF
        forms = [kept.Form.of(code) for code in table[..., Field.FORM].flatten().tolist() if code]
        return Kinds(
            signs=bool((table[..., Field.PLANES] > 0).any()),
            columns=bool((table[..., Field.COL] != NONE).any()),
            planes=max(1, int(table[..., Field.PLANES].max())),
            rank=int((table[..., Field.RANK] * (table[..., Field.RANK] % 2 == 0)).max()),
            dense=bool((table[..., Field.DENSE] != NONE).any()),
            compact=max(form.bits for form in forms) if forms else 0,
            tall=bool(forms) and all(form.mask_rows == 64 for form in forms),
            rows=bool((table[..., Field.ROWS] > 0).any()),
            byte_rank=int((table[..., Field.RANK] * (table[..., Field.RANK] % 2)).max()) // 16 * 16,
        )

    def matrix(self, entry: int, target: Target) -> torch.Tensor:
        """D float32 [N, K] of one entry, without replaced rows; N the entry's own number of outputs."""
        found = [d for d in self.meaning.get((entry, target.index), []) if not isinstance(d, RowsDelta)]
        matrices = [matrix(d) for d in found] or [torch.zeros(target.outputs, target.inputs)]
        return torch.stack(matrices).sum(0)

    def replaced(self, entry: int, target: Target) -> RowsDelta | None:
        found = [d for d in self.meaning.get((entry, target.index), []) if isinstance(d, RowsDelta)]
        return found[0] if found else None


def world(
    targets: Sequence[Target], entries: Sequence[Spec], dtype: torch.dtype, *, vectors: int = 0, seed: int = 0
) -> World:
    """Entry 0 is the base; entry e has `entries[e - 1]` for every target."""
    gen = torch.Generator().manual_seed(seed)
    writer = SlabWriter()
    table = torch.zeros(len(entries) + 1, len(targets), FIELDS, dtype=torch.int32)
    offsets = [f for f in Field if f not in (Field.PLANES, Field.RANK, Field.ROWS, Field.OUTPUTS, Field.FORM)]
    table[:, :, offsets] = NONE
    meaning: dict[tuple[int, int], list[LinearDelta]] = {}
    for e, spec in enumerate(entries, start=1):
        for j, target in enumerate(targets):
            meaning[e, target.index] = _add(writer, table[e, j], target, spec, dtype, gen)
    own = torch.randn(len(entries) + 1, vectors, generator=gen).to(dtype)
    starts = [writer.add(row) for row in own] if vectors else [NONE] * (len(entries) + 1)
    slab = writer.finish()
    deltas = DeviceDeltas(slab, table.to(DEVICE), torch.tensor(starts, dtype=torch.int32, device=DEVICE))
    return World(list(targets), dtype, deltas, meaning, own)


def _add(
    writer: SlabWriter, row_F: torch.Tensor, target: Target, spec: Spec, dtype: torch.dtype, gen: torch.Generator
) -> list[LinearDelta]:
    n, k, found = target.outputs + spec.get("extra", 0), target.inputs, []
    if spec.get("extra"):
        row_F[Field.OUTPUTS] = n
    if planes := spec.get("signs", 0):
        found += _add_signs(writer, row_F, replace(target, outputs=n), planes, spec.get("col", False), gen)
    if bits := spec.get("quant", 0):
        found += _add_quant(writer, row_F, replace(target, outputs=n), bits, gen)
    if rank := spec.get("rank", 0):
        has = spec.get("members", range(len(target.members)))
        found += _add_low_rank(writer, row_F, target, rank, list(has), dtype, gen)
    if rank := spec.get("bytes", 0):
        has = spec.get("members", range(len(target.members)))
        rank = min(rank, target.outputs, k)
        found += _add_bytes(writer, row_F, replace(target, outputs=n), rank, list(has), gen)
    if spec.get("dense"):
        weight = (torch.randn(n, k, generator=gen) * 0.02).to(dtype)
        row_F[Field.DENSE] = writer.add(weight)
        found.append(DenseDelta(weight))
    if form := spec.get("kept"):
        found.append(_add_kept(writer, row_F, replace(target, outputs=n), form, gen))
    if count := spec.get("rows", 0):
        index = torch.randperm(n, generator=gen)[:count].sort().values
        value = torch.randn(count, k, generator=gen).to(dtype)
        row_F[Field.ROW_INDEX], row_F[Field.ROWS] = writer.add(index.int()), count
        row_F[Field.ROW_VALUE] = writer.add(value)
        found.append(RowsDelta(index, value))
    return found


def _write_signs(
    writer: SlabWriter, row_F: torch.Tensor, sign_PNk: torch.Tensor, scale_PN: torch.Tensor, k: int
) -> None:
    planes, n = scale_PN.shape
    high, wide = fragments.tiles(n, k)
    packed = torch.empty(planes, high, wide, 32, 4, dtype=torch.int32)
    fragments.pack(sign_PNk, packed)
    row_F[Field.SIGN], row_F[Field.PLANES] = writer.add(packed), planes
    row_F[Field.SCALE] = writer.add(torch.nn.functional.pad(scale_PN, (0, high * 16 - n)))


def _random_signs(planes: int, n: int, k: int, gen: torch.Generator) -> torch.Tensor:
    sign_PNk = torch.randint(0, 256, (planes, n, -(-k // 8)), dtype=torch.uint8, generator=gen)
    if k % 8:
        sign_PNk[..., -1] &= (1 << (k % 8)) - 1
    return sign_PNk


def _add_signs(
    writer: SlabWriter, row_F: torch.Tensor, target: Target, planes: int, columns: bool, gen: torch.Generator
) -> list[LinearDelta]:
    n, k = target.outputs, target.inputs
    sign_PNk, scale_PN = _random_signs(planes, n, k, gen), torch.rand(planes, n, generator=gen) * 0.02
    _write_signs(writer, row_F, sign_PNk, scale_PN, k)
    if not columns:
        return [SignDelta(sign_PNk, scale_PN, None, k)]
    col_PmK = torch.rand(planes, len(target.members), k, generator=gen) * 1.5 + 0.25
    width = fragments.tiles(n, k)[1] * 256
    row_F[Field.COL] = writer.add(torch.nn.functional.pad(col_PmK, (0, width - k)))
    whole = torch.zeros(n, k)
    for m, (start, stop) in enumerate(member_rows(target)):
        part = SignDelta(sign_PNk[:, start:stop], scale_PN[:, start:stop], col_PmK[:, m], k)
        whole[start:stop] = matrix(part)
    return [DenseDelta(whole)]


def _add_quant(
    writer: SlabWriter, row_F: torch.Tensor, target: Target, bits: int, gen: torch.Generator
) -> list[LinearDelta]:
    n, k = target.outputs, target.inputs
    sign_PNk, scale_N = _random_signs(bits, n, k, gen), torch.rand(n, generator=gen) * 0.01
    weights_P = 2.0 ** (torch.arange(bits) - 1)
    _write_signs(writer, row_F, sign_PNk, weights_P[:, None] * scale_N, k)
    zero = torch.nn.functional.pad(-scale_N / 2, (0, -n % 16))
    row_F[Field.ZERO] = writer.add(zero)
    planes = SignDelta(sign_PNk, weights_P[:, None] * scale_N, None, k)
    return [planes, DenseDelta((-scale_N / 2)[:, None].expand(n, k).contiguous())]


def _add_kept(
    writer: SlabWriter, row_F: torch.Tensor, target: Target, form: kept.Form, gen: torch.Generator
) -> LinearDelta:
    n, k = target.outputs, target.inputs
    values, groups = form.values(k), -(-k // form.group)
    q_NV = torch.randint(0, 1 << form.bits, (n, values), dtype=torch.uint8, generator=gen)
    order = torch.rand(form.blocks(n), groups, form.group, generator=gen).argsort(2)[..., : form.kept]
    columns_MV = (order + torch.arange(groups)[:, None] * form.group).flatten(1)
    step_N = torch.rand(n, generator=gen) * 0.01
    packed = torch.full(form.tile_shape(n, k), -1, dtype=torch.int32)
    kept.pack_values(q_NV, form, packed)
    inputs = torch.full(form.input_shape(n, k), POISON, dtype=torch.uint8)
    kept.pack_inputs(columns_MV, form, inputs)
    step = torch.nn.functional.pad(step_N, (0, -n % 16)).view(torch.uint8)
    row_F[Field.KEPT], row_F[Field.INPUTS] = writer.add(packed), writer.add(torch.cat([step, inputs.flatten()]))
    row_F[Field.FORM] = form.code
    whole = torch.zeros(n, groups * form.group)
    for row in range(n):
        whole[row, columns_MV[row // form.mask_rows]] = (2 * q_NV[row].float() - (2**form.bits - 1)) * step_N[row]
    return DenseDelta(whole[:, :k].contiguous())


def _add_low_rank(
    writer: SlabWriter,
    row_F: torch.Tensor,
    target: Target,
    rank: int,
    has: list[int],
    dtype: torch.dtype,
    gen: torch.Generator,
) -> list[LinearDelta]:
    padded, count = -(-rank // 16) * 16, len(target.members)
    a = torch.zeros(count, padded, target.inputs)
    b = torch.zeros(target.outputs, padded)
    whole = torch.zeros(target.outputs, target.inputs)
    for m, (start, stop) in enumerate(member_rows(target)):
        if m in has:
            a[m, :rank] = (torch.randn(rank, target.inputs, generator=gen) * 0.1).to(dtype).float()
            b[start:stop, :rank] = (torch.randn(stop - start, rank, generator=gen) * 0.1).to(dtype).float()
            whole[start:stop] = matrix(LowRankDelta(a[m], b[start:stop]))
    row_F[Field.LORA_A], row_F[Field.LORA_B] = writer.add(a.to(dtype)), writer.add(b.to(dtype))
    row_F[Field.RANK] = padded
    return [DenseDelta(whole)]


def _add_bytes(
    writer: SlabWriter, row_F: torch.Tensor, target: Target, rank: int, has: list[int], gen: torch.Generator
) -> list[LinearDelta]:
    padded, count = -(-rank // 16) * 16, len(target.members)
    a = torch.zeros(count, padded, target.inputs, dtype=torch.int8)
    b = torch.zeros(target.outputs, padded, dtype=torch.int8)
    scale, whole = torch.zeros(count, padded), torch.zeros(target.outputs, target.inputs)
    for m, (start, stop) in enumerate(member_rows(target)):
        if m in has:
            a[m, :rank] = torch.randint(-127, 128, (rank, target.inputs), generator=gen)
            b[start:stop, :rank] = torch.randint(-127, 128, (stop - start, rank), generator=gen)
            scale[m, :rank] = (torch.rand(rank, generator=gen) + 0.5) * 1e-5
            whole[start:stop] = matrix(LowRankDelta(a[m] * scale[m, :, None], b[start:stop].float()))
    row_F[Field.LORA_A] = writer.add(torch.cat([a.flatten().view(torch.uint8), scale.flatten().view(torch.uint8)]))
    row_F[Field.LORA_B], row_F[Field.RANK] = writer.add(b), padded + BYTES
    return [DenseDelta(whole)]


def member_rows(target: Target) -> list[tuple[int, int]]:
    """(start, stop) of each member's outputs."""
    return list(zip(target.members, [*target.members[1:], target.outputs], strict=True))


MIXES: dict[str, list[int]] = {
    "base": [0, 0, 0],
    "one": [1],
    "distinct": list(range(10)),
    "identical": [3] * 7,
    "uniform": [0, 0, 1, 1, 2, 2, 3, 3],
    "zipf": [0, 0, 0, 1, 1, 1, 1, 2, 4, 7],
}
"""The entry of every row; entries are those of ENTRIES, in order, from 1."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch by entry, padded as a graph's."""

    entry_T: torch.Tensor
    segments_G4: torch.Tensor
    entries: list[int]
    """Of the rows that are not padding"""

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        return [tuple(s[:3]) for s in self.segments_G4.tolist() if s[2] > s[1]]


def rows(entries: Sequence[int], *, padding: int = 0, spare_segments: int = 0) -> Rows:
    """Rows grouped by entry; `padding` rows of entry 0 and `spare_segments` empty segments follow."""
    grouped = sorted(entries)
    distinct = sorted({e for e in grouped if e > 0})
    segments = segment_table([(e, grouped.index(e), grouped.index(e) + grouped.count(e)) for e in distinct])
    segments += [[0, 0, 0, 0]] * (spare_segments or (not segments))
    return Rows(
        torch.tensor([*grouped, *[0] * padding], dtype=torch.int32, device=DEVICE),
        torch.tensor(segments, dtype=torch.int32, device=DEVICE),
        grouped,
    )


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An output buffer that shows what was never written: NaN, or -12345 in integers."""
    value = float("nan") if dtype.is_floating_point else -12345
    return torch.full(tuple(shape), value, dtype=dtype, device=DEVICE)
