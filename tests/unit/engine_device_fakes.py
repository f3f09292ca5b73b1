"""The tiny model of `engine_fakes` behind the device runner: its decoder sees what kernels see, and is as strict.

The accelerator is a CPU that takes a GPU's liberties: results are not there before their mark, a capture launches a few
times, and what is launched outside the order of steps is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch

from bitdelta_core.engine.accelerator import Mark, Plain
from bitdelta_core.engine.device_runner import DeviceRunner, Limits
from bitdelta_core.models.device.kinds import StepKinds, single, step_union
from bitdelta_core.models.device.passes import WideStep
from kernels.delta_linear.row_tiles import starts
from kernels.device import StepRows
from tests.unit.engine_fakes import BASE_SALT, VOCAB, logits_of, salt_in

T = TypeVar("T")


class LatePlain(Plain):
    """See the module."""

    keeps_host_buffers = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.inside = 0
        self.captures = 0
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def in_steps(self) -> AbstractContextManager[object]:
        return self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self.inside += 1
        yield
        self.inside -= 1

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        assert self.inside
        return super().to_device(host)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.inside
        self._copies.append((host := torch.full_like(tensor, -77), tensor.clone()))
        return host

    def mark(self) -> Mark:
        copies, self._copies = self._copies, []
        return LateMark(copies)

    def capture(self, launch: Callable[[], T]) -> Callable[[], T]:
        self.captures += 1
        for _ in range(3):
            launch()
        return launch


class LateMark:
    def __init__(self, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._copies = copies

    def reached(self) -> bool:
        return not self._copies

    @torch.inference_mode()
    def wait(self) -> None:
        for host, value in self._copies:
            host.copy_(value)
        self._copies = []


class FakeTables:
    """Which bytes of the slab are whose."""

    def __init__(self, accelerator: LatePlain) -> None:
        self.extents: dict[int, torch.Tensor] = {}
        self.kinds: dict[int, StepKinds] = {}
        self._accelerator = accelerator

    def publish(self, slot: int, weights: Any, extent_start: int) -> None:
        assert slot + 1 not in self.extents
        assert weights.vectors.storage_offset() == extent_start
        self.extents[slot + 1], self.kinds[slot + 1] = weights.vectors, weights.kinds

    def clear(self, slot: int) -> None:
        del self.extents[slot + 1], self.kinds[slot + 1]


class FakePassDecoder:
    """KV is one int64 per token: salt * 1000 + token. Logits are views of one buffer, gone with the next pass."""

    def __init__(self, tables: FakeTables, accelerator: LatePlain, block_size: int, rows: int) -> None:
        self.block_size = block_size
        self.base_salt = BASE_SALT
        self.rows_computed = 0
        self.before_forward: Callable[[], None] = lambda: None
        self._tables = tables
        self._accelerator = accelerator
        self._logits = torch.empty(rows, VOCAB)

    def decode(self, rows: StepRows, sampled_S: torch.Tensor, kv: Any, kinds: StepKinds) -> torch.Tensor:
        used = int((rows.context_lens_S > 0).sum())
        assert (rows.context_lens_S[:used] > 0).all(), "padding between rows"
        padding = (rows.tokens_T, rows.positions_T, rows.kv_slots_T, rows.entry_T)
        assert all((column[used:] == 0).all() for column in padding), "padding is not padding"
        assert (rows.source_T[used:] == -1).all()
        self._check_segments(rows.segments_G4, rows.entry_T.tolist())
        assert torch.equal(rows.segments_G4, rows.logit_segments_G4)
        starts = [*range(used + 1), *[used] * (rows.tokens_T.shape[0] - used)]
        assert rows.query_starts_S1.tolist() == starts
        self._pass(rows, range(used), list(range(used)), sampled_S, kv, kinds)
        return self._logits[: rows.tokens_T.shape[0]]

    def prefill(self, step: WideStep, sampled_S: torch.Tensor, kv: Any, kinds: StepKinds) -> torch.Tensor:
        rows, entries = step.rows, step.rows.entry_T.tolist()
        tiles = [tuple(tile[:3]) for tile in step.tiles_I4.tolist()]
        sizes = pairwise([*starts(step.segments).values(), len(tiles)])
        for spans in (step.segments, *(tiles[first:last] for first, last in sizes)):
            if not rows.kv_slots_T.any():
                continue  # padding may belong to anybody
            assert [e for e, start, stop in spans for _ in range(start, stop)] == entries, "rows of another entry"
        wanted = rows.logit_rows_L.tolist()
        self._check_segments(rows.logit_segments_G4, [entries[row] for row in wanted])
        begins = rows.query_starts_S1.tolist()
        assert begins[-1] == len(entries)
        assert step.max_query == max(b - a for a, b in pairwise(begins))
        owner = [s for s, (a, b) in enumerate(pairwise(begins)) for _ in range(a, b)]
        self._pass(rows, wanted, owner, sampled_S, kv, kinds)
        return self._logits[: len(wanted)]

    def _pass(
        self, rows: StepRows, wanted: Any, owner: list[int], sampled_S: torch.Tensor, kv: Any, kinds: StepKinds
    ) -> None:
        assert self._accelerator.inside
        self.before_forward()
        self.rows_computed += len(owner)
        entries = rows.entry_T.tolist()[: len(owner)]
        variants = [e for e in entries if e]
        met = step_union([self._tables.kinds[e] for e in set(variants)])
        if len(set(variants)) == len(variants):
            met = single(met)
        assert step_union([met, kinds]) == kinds, "kernels that the step needs are not launched"
        salts = [salt_in(self._tables.extents[e]) if e else self.base_salt for e in entries]
        self._logits.fill_(torch.nan)
        for row, salt in enumerate(salts):
            source, token = int(rows.source_T[row]), int(rows.tokens_T[row])
            kv[int(rows.kv_slots_T[row])] = salt * 1000 + (token if source < 0 else int(sampled_S[source]))
        for i, row in enumerate(wanted):
            if not rows.kv_slots_T[row]:
                continue  # padding
            position, table = int(rows.positions_T[row]), rows.block_tables_SM[owner[row]].numpy()
            assert position < rows.context_lens_S[owner[row]]
            self._logits[i] = torch.from_numpy(logits_of(kv, table, position, salts[row], self.block_size))

    def _check_segments(self, segments_G4: torch.Tensor, entries: list[int]) -> None:
        covered = np.zeros(len(entries), np.int64)
        for entry, start, stop, _ in segments_G4.tolist():
            assert all(e == entry for e in entries[start:stop]), "rows of another entry"
            covered[start:stop] += 1
        assert covered.tolist() == [int(e > 0) for e in entries]


def device_runner(
    blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
) -> tuple[DeviceRunner, FakeTables, FakePassDecoder, LatePlain]:
    accelerator = LatePlain()
    tables = FakeTables(accelerator)
    decoder = FakePassDecoder(tables, accelerator, block_size, max(max_num_seqs, max_num_batched_tokens))
    limits = Limits(
        sequences=max_num_seqs, rows=max_num_batched_tokens, blocks=blocks - 1, block_size=block_size, vocab=VOCAB
    )
    kv = torch.zeros(blocks * block_size, dtype=torch.int64)
    runner = DeviceRunner(decoder, kv, accelerator, limits, sizes=(1, 2, 4), depth=1)
    runner.warm_up()
    decoder.rows_computed = 0
    return runner, tables, decoder, accelerator
