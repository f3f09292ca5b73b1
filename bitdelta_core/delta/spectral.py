"""Codec `spectral`: the difference as a product of two factors of small integers, entropy-coded.

D = sum_i scale_i b_i a_i^T over the components i of a weighted singular value decomposition. Each component has its own
step, so that its bits follow its weight (the idea of Delta-CoMe, arXiv 2406.08903, without its fixed classes), down to
components of which most values are zero and cost a fraction of a bit. `allocation.py` makes the factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from bitdelta_core.delta import entropy, rans
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import DeltaFormatError

_T = TypeVar("_T")
STEPS_PER_OCTAVE = 8
"""Component scales are powers of 2^(1/8), times one scale of the matrix."""
_TOGETHER = {"cuda": 1 << 28, "cpu": 1 << 25}
"""Values that are coded or decoded together."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One matrix's difference, quantised; r components, none of them all zero."""

    a_rK: torch.Tensor
    """int8"""
    b_rN: torch.Tensor
    """int8, a component per row"""
    scale: float
    exponent_r: torch.Tensor
    """uint8"""

    @property
    def rank(self) -> int:
        return self.a_rK.shape[0]

    def matrix(self) -> torch.Tensor:
        """The difference, fp32 [N, K]."""
        scale_r = component_scales(torch.tensor([self.scale], device=self.a_rK.device), self.exponent_r)
        return (self.b_rN.float().T * scale_r) @ self.a_rK.float()

    def to(self, device: torch.device | str) -> Coded:
        return Coded(self.a_rK.to(device), self.b_rN.to(device), self.scale, self.exponent_r.to(device))

    def symbols(self, spread_2r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(int8 values, uint8 classes) in the order that is stored."""
        values = torch.cat([self.a_rK.flatten(), self.b_rN.flatten()])
        return values, _per_symbol(spread_2r, self.a_rK.shape[1], self.b_rN.shape[1])


def parts_of(found: Sequence[Coded], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """What is stored of each, but for `extra`. They are coded together, as many at a time as `_TOGETHER` allows."""
    parts = []
    for group in _groups(found, [coded.a_rK.numel() + coded.b_rN.numel() for coded in found], device):
        there = [coded.to(device) for coded in group]
        spreads = [torch.stack([entropy.best_classes(q)[0] for q in (c.a_rK, c.b_rN)]) for c in there]
        codes = rans.encode([c.symbols(spread) for c, spread in zip(there, spreads, strict=True)], device)
        for coded, spread, code in zip(group, spreads, codes, strict=True):
            scale = torch.tensor([coded.scale])
            parts.append({"code": code, "scale": scale, "exponent": coded.exponent_r.cpu(), "spread": spread.cpu()})
    return parts


def coded_of(stored: Sequence[tuple[TensorEntry, Mapping[str, torch.Tensor]]], device: torch.device) -> list[Coded]:
    """The factors of each, on the device. They are decoded together, as `parts_of` codes them.

    Raises:
        DeltaFormatError: a code does not decode.
    """
    found = []
    for group in _groups(stored, [values_of(entry) for entry, _ in stored], device):
        items = [(parts["code"], _per_symbol(parts["spread"], entry.shape[1], entry.rows)) for entry, parts in group]
        try:
            values = _decoded(items) if device.type == "cpu" else rans.decode(items, device)
        except entropy.BadCode as error:
            raise DeltaFormatError(f"codes of {group[0][0].name} to {group[-1][0].name}: {error}") from error
        for (entry, parts), value in zip(group, values, strict=True):
            split = entry.rank * entry.shape[1]
            a_rK, b_rR = value[:split].view(entry.rank, -1), value[split:].view(entry.rank, -1)
            found.append(Coded(a_rK, b_rR, parts["scale"].item(), parts["exponent"].to(device)))
    return found


def _decoded(items: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """As `rans.decode`, which takes several times as long on a CPU."""
    found = entropy.decode_together([(code.numpy(), classes.numpy()) for code, classes in items])
    return [torch.from_numpy(values) for values in found]


def together(entries: Sequence[TensorEntry], device: torch.device) -> Iterator[list[TensorEntry]]:
    """Neighbours that `coded_of` decodes at once."""
    return _groups(entries, [values_of(entry) for entry in entries], device)


def values_of(entry: TensorEntry) -> int:
    """How many integers its code stands for."""
    return entry.rank * (entry.shape[1] + entry.rows)


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's matrix, fp32 [N, K]."""
    a_rK, b_Rr, scale_r = factors(entry, parts)
    known = base[: entry.rows].float() + (b_Rr.float() * scale_r) @ a_rK.float()
    return torch.cat([known, parts["extra"].float()])


def factors(entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(int8 A [r, K], int8 B [R, r], fp32 [r]) with D = B diag(scale) A.

    Raises:
        DeltaFormatError: the code does not decode.
    """
    columns = entry.shape[1]
    try:
        values = entropy.decode(parts["code"].numpy(), _per_symbol(parts["spread"], columns, entry.rows).numpy())
    except entropy.BadCode as error:
        raise DeltaFormatError(f"{entry.part_name('code')}: {error}") from error
    split = entry.rank * columns
    a_rK = torch.from_numpy(values[:split]).view(entry.rank, columns)
    b_rR = torch.from_numpy(values[split:]).view(entry.rank, entry.rows)
    return a_rK, b_rR.T, component_scales(parts["scale"], parts["exponent"])


def component_scales(scale: torch.Tensor, exponent_r: torch.Tensor) -> torch.Tensor:
    """fp32 [r]: scale * 2^(-exponent / 8)."""
    return scale * torch.exp2(-exponent_r.float() / STEPS_PER_OCTAVE)


def _per_symbol(spread_2r: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    return torch.cat([spread_2r[0].repeat_interleave(columns), spread_2r[1].repeat_interleave(rows)])


def _groups(items: Sequence[_T], sizes: Sequence[int], device: torch.device) -> Iterator[list[_T]]:
    """Neighbours whose sizes add up to `_TOGETHER` at most, or one that is larger."""
    group: list[_T] = []
    most = room = _TOGETHER[device.type]
    for item, size in zip(items, sizes, strict=True):
        if group and size > room:
            yield group
            group, room = [], most
        group.append(item)
        room -= size
    if group:
        yield group
