"""The device tables: which entry's parts lie where in the slab, and how its rows are turned and masked.

Entry 0 is the base; slot s is entry s + 1. Between steps the engine publishes a variant whose bytes have arrived in its
extent, or clears a slot whose extent goes to another. Kernels that were captured read the tables at fixed addresses.

An entry that nobody has published is not the base: its vectors are NaN and so are its rope frequencies, so that rows
sent there by mistake come out as NaN, which fails their request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.kinds import StepKinds, step_union
from bitdelta_core.models.device.layout import DeviceLayout, empty_rows
from bitdelta_core.models.device.targets import targets_of
from bitdelta_core.models.rope import RopeConfig, inv_freq
from kernels.device import UNIT, DeviceDeltas
from kernels.rotary.device import RopeTables


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """What the tables say of one entry, on the host."""

    row_JF: torch.Tensor
    vectors: int
    vocab: int
    rope_F: torch.Tensor
    kinds: StepKinds


class DeltaTables:
    """Owns the tables and one extent of the slab, for the base's vectors. All methods are the engine thread's."""

    def __init__(
        self, config: ModelConfig, vectors_V: torch.Tensor, slab: torch.Tensor, base_extent_start: int, slots: int
    ) -> None:
        """Args:
        vectors_V: all of the base's 1-D parameters.
        slab: uint8, all of it.
        base_extent_start: bytes, of an extent of `base_bytes(vectors_V)`, pinned for ever.
        """
        assert base_extent_start % UNIT == 0
        assert slab.data_ptr() % UNIT == 0 or slab.device.type == "cpu", "the slab is not aligned"
        device, entries, targets = slab.device, slots + 1, len(targets_of(config))
        self.config = config
        self._blocks = _write_base(slab, vectors_V, base_extent_start)
        self.deltas = DeviceDeltas(
            slab,
            torch.empty((entries, targets, empty_rows(1).shape[1]), dtype=torch.int32, device=device),
            torch.empty(entries, dtype=torch.int32, device=device),
        )
        self.rope = RopeTables.empty(entries, config.head_dim, device)
        self.vocab_E = torch.empty(entries, dtype=torch.int32, device=device)
        """How many logits of each entry's rows count."""
        self._void = _Entry(
            empty_rows(targets), self._blocks[1], 0, torch.full_like(_rope_row(config.rope), torch.nan), StepKinds()
        )
        base = _Entry(empty_rows(targets), self._blocks[0], config.vocab_size, _rope_row(config.rope), StepKinds())
        self._entries = [base, *[self._void] * slots]
        for entry in range(entries):
            self._write(entry)

    @staticmethod
    def base_bytes(vectors_V: torch.Tensor) -> int:
        """Of the base's extent: its vectors, and as many NaN for entries without a variant."""
        return 2 * _aligned(vectors_V.nbytes)

    @property
    def slots(self) -> int:
        return len(self._entries) - 1

    @property
    def kinds(self) -> StepKinds:
        """What steps over the published variants may meet."""
        return step_union([entry.kinds for entry in self._entries])

    def publish(self, slot: int, layout: DeviceLayout, extent_start: int) -> None:
        """From the next launch on this stream, slot's rows are computed with the bytes at `extent_start` of the slab.

        Does not wait: a few small copies, in order with the steps before and after. The bytes must be there already.
        """
        assert self._entries[slot + 1] is self._void, f"slot {slot} is published twice"
        assert extent_start + layout.nbytes <= self.deltas.slab.numel(), "extent beyond the slab"
        vectors = layout.vectors_at(extent_start)
        self._entries[slot + 1] = _Entry(
            layout.row(extent_start),
            self._blocks[0] if vectors is None else vectors,
            layout.config.vocab_size,
            _rope_row(layout.config.rope),
            layout.kinds,
        )
        self._write(slot + 1)

    def clear(self, slot: int) -> None:
        """The variant is gone."""
        assert self._entries[slot + 1] is not self._void, f"slot {slot} is cleared, but nothing is published there"
        self._entries[slot + 1] = self._void
        self._write(slot + 1)

    def check_integrity(self) -> None:
        """Assert that the device holds what was published, and the base's entry no parts. Waits for the device."""
        for i, entry in enumerate(self._entries):
            assert torch.equal(self.deltas.table_EJF[i].cpu(), entry.row_JF), f"table row {i} was overwritten"
            assert int(self.deltas.vectors_E[i]) == entry.vectors, f"vectors of entry {i} were overwritten"
            assert int(self.vocab_E[i]) == entry.vocab, f"vocabulary of entry {i} was overwritten"
            rope_F = self.rope.values_EF[i].cpu()
            assert torch.equal(rope_F.view(torch.int32), entry.rope_F.view(torch.int32)), f"rope of {i} was overwritten"
        assert torch.equal(self._entries[0].row_JF, empty_rows(self._entries[0].row_JF.shape[0])), "the base has parts"
        published = [entry for entry in self._entries[1:] if entry is not self._void]
        assert all(entry.vectors != self._blocks[1] for entry in published), "a variant with the void's vectors"

    def _write(self, i: int) -> None:
        entry = self._entries[i]
        _copy(self.deltas.table_EJF[i], entry.row_JF)
        _copy(self.deltas.vectors_E[i : i + 1], torch.tensor([entry.vectors], dtype=torch.int32))
        _copy(self.vocab_E[i : i + 1], torch.tensor([entry.vocab], dtype=torch.int32))
        _copy(self.rope.values_EF[i], entry.rope_F)


def _copy(device: torch.Tensor, host: torch.Tensor) -> None:
    """In stream order, without waiting. torch keeps pinned memory until copies from it are done."""
    device.copy_(host.pin_memory() if device.is_cuda else host, non_blocking=True)


def _write_base(slab: torch.Tensor, vectors_V: torch.Tensor, start: int) -> tuple[int, int]:
    """Offsets in UNITs of the base's vectors and of the void's."""
    size = _aligned(vectors_V.nbytes)
    for at, value in ((start, vectors_V), (start + size, torch.full_like(vectors_V, torch.nan))):
        slab[at : at + vectors_V.nbytes].view(vectors_V.dtype).copy_(value)
    return start // UNIT, (start + size) // UNIT


def _rope_row(rope: RopeConfig) -> torch.Tensor:
    dynamic = (rope.factor, rope.max_positions) if rope.kind == "dynamic" else None
    return RopeTables.row(inv_freq(rope, torch.device("cpu")), rope.attention_factor, dynamic)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // UNIT) * UNIT
