"""From a step's work to one Batch and its logits. Metadata is built once per step, from a few flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, Protocol

import numpy as np
import torch

from bitdelta_core.engine.scheduler import Work
from bitdelta_core.models.batch import Batch
from bitdelta_core.models.variant import VariantWeights
from kernels.segments import Segment


class Forward(Protocol):
    """What the engine needs of a decoder."""

    def forward(self, batch: Batch, kv: Any) -> torch.Tensor:
        """float32 logits [L, V]; columns beyond a row's own vocabulary are -inf."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """The logits of one step. `rows[i]` are those of work i: all of its rows when prompt log-probabilities are wanted,
    its last one when it samples, else none."""

    logits_LV: torch.Tensor
    rows: tuple[slice, ...]


class Runner:
    """Owns the decoder and the KV cache."""

    def __init__(self, decoder: Forward, kv: Any, *, block_size: int, device: torch.device) -> None:
        self._decoder = decoder
        self._kv = kv
        self._block_size = block_size
        self._device = device

    @torch.inference_mode()
    def run(self, work: Sequence[Work], variants: Mapping[int, VariantWeights]) -> Computed:
        """Compute the rows of `work`, which is sorted by slot."""
        wanted = [_logit_rows(w) for w in work]
        batch = self._batch(work, wanted, variants)
        ends = [0, *accumulate(wanted)]
        rows = tuple(slice(a, b) for a, b in pairwise(ends))
        return Computed(self._decoder.forward(batch, self._kv), rows)

    def _batch(self, work: Sequence[Work], wanted: Sequence[int], variants: Mapping[int, VariantWeights]) -> Batch:
        starts = [0, *accumulate(w.rows for w in work)]
        tokens = np.fromiter(_token_ids(work), np.int64, starts[-1])
        counts = [w.rows for w in work]
        owner = np.repeat(np.arange(len(work)), counts)
        first = np.fromiter((w.start for w in work), np.int64, len(work)) - np.array(starts[:-1])
        positions = np.arange(starts[-1]) + first[owner]
        tables = np.zeros((len(work), max(len(w.seq.table) for w in work)), np.int32)
        for i, w in enumerate(work):
            tables[i, : len(w.seq.table)] = w.seq.table
        block, offset = np.divmod(positions, self._block_size)
        slots = tables[owner, block].astype(np.int64) * self._block_size + offset
        logit_rows = [r for stop, n in zip(starts[1:], wanted, strict=True) for r in range(stop - n, stop)]
        return Batch(
            token_ids_T=self._to_device(tokens),
            positions_T=self._to_device(positions),
            kv_slots_T=self._to_device(slots),
            query_starts=tuple(starts),
            context_lens=tuple(w.start + w.rows for w in work),
            block_tables_SM=self._to_device(tables),
            logit_rows_L=self._to_device(np.array(logit_rows, np.int64)),
            segments=_segments(work, counts),
            logit_segments=_segments(work, wanted),
            variants={w.seq.slot: variants[w.seq.slot] for w in work if w.seq.delta is not None},
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _token_ids(work: Sequence[Work]) -> Iterator[int]:
    for w in work:
        yield from w.seq.tokens[w.start : w.start + w.rows]


def _logit_rows(work: Work) -> int:
    return work.rows if work.seq.wants_prompt_logprobs else int(work.samples)


def _segments(work: Sequence[Work], counts: Sequence[int]) -> tuple[Segment, ...]:
    """One per variant, over rows of which work i has counts[i]."""
    segments, at = [], 0
    for slot, group in groupby(zip(work, counts, strict=True), key=lambda pair: pair[0].seq.slot):
        stop = at + sum(n for _, n in group)
        if stop > at:
            segments.append(Segment(slot, at, stop))
        at = stop
    return tuple(segments)
