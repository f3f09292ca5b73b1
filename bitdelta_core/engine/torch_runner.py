"""A step at once, in torch: one Batch, its logits, its samples. What serves a CPU, and a GPU without device kernels.

Metadata is built once per step, from a few flat arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, Protocol

import numpy as np
import torch

from bitdelta_core.engine.api import SamplingParams
from bitdelta_core.engine.runner import Done, Outcome, Pending, Task
from bitdelta_core.engine.sampler import LogprobRow, Row, logprob_rows, sample
from bitdelta_core.engine.scheduler import Work
from bitdelta_core.models.batch import Batch
from kernels.segments import Segment


class Forward(Protocol):
    """What the runner needs of a decoder."""

    def forward(self, batch: Batch, kv: Any) -> torch.Tensor:
        """float32 logits [L, V]; columns beyond a row's own vocabulary are -inf."""
        ...


class TorchRunner:
    """Owns the decoder and the KV cache."""

    depth = 0

    def __init__(self, decoder: Forward, kv: Any, *, block_size: int, device: torch.device) -> None:
        self._decoder = decoder
        self._kv = kv
        self._block_size = block_size
        self._device = device

    def is_synchronous(self, params: SamplingParams) -> bool:
        return False

    def launch(self, tasks: Sequence[Task]) -> Pending:
        """Everything: the results are there when it returns."""
        return Done(self.compute(tasks, self.batch(tasks)))

    @torch.inference_mode()
    def compute(self, tasks: Sequence[Task], batch: Batch) -> list[Outcome]:
        """Logits and what is read off them."""
        logits_LV = self._decoder.forward(batch, self._kv)
        rows = [slice(a, b) for a, b in pairwise([0, *accumulate(_logit_rows(t.work) for t in tasks)])]
        prompts = [_prompt_logprobs(t.work, logits_LV[r]) for t, r in zip(tasks, rows, strict=True)]
        sampling = [i for i, t in enumerate(tasks) if t.work.samples]
        if not sampling:
            return [Outcome(None, prompt) for prompt in prompts]
        if len(sampling) != logits_LV.shape[0]:
            logits_LV = logits_LV[[rows[i].stop - 1 for i in sampling]]
        samples = dict(zip(sampling, sample(logits_LV, [_sampling_row(tasks[i]) for i in sampling]), strict=True))
        return [Outcome(samples.get(i), prompt) for i, prompt in enumerate(prompts)]

    def batch(self, tasks: Sequence[Task]) -> Batch:
        """The tasks' rows, and the logits that they want."""
        work = [t.work for t in tasks]
        wanted = [_logit_rows(w) for w in work]
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
            context_lens=tuple(w.stop for w in work),
            block_tables_SM=self._to_device(tables),
            logit_rows_L=self._to_device(np.array(logit_rows, np.int64)),
            segments=_segments(work, counts),
            logit_segments=_segments(work, wanted),
            variants={t.work.seq.slot: t.weights for t in tasks if t.weights is not None},
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _token_ids(work: Sequence[Work]) -> Iterator[int]:
    """0 where the host does not know a token yet."""
    for w in work:
        known = w.seq.tokens[w.start : w.stop]
        yield from known
        yield from (0 for _ in range(w.rows - len(known)))


def _logit_rows(work: Work) -> int:
    return work.rows if work.prompt_logprobs else int(work.samples)


def _prompt_logprobs(work: Work, logits_LV: torch.Tensor) -> list[LogprobRow]:
    """Of the prompt tokens that follow the work's rows."""
    following = work.seq.tokens[work.start + 1 : work.stop + 1]
    if not work.prompt_logprobs or not following:
        return []
    return logprob_rows(logits_LV[: len(following)], following, work.seq.request.params.prompt_logprobs or 0)


def _sampling_row(task: Task) -> Row:
    seq = task.work.seq
    generated = seq.tokens[seq.prompt_len :] if task.state.shapes else ()
    return Row(task.state, generated, task.work.stop)


def _segments(work: Sequence[Work], counts: Sequence[int]) -> tuple[Segment, ...]:
    """One per variant, over rows of which work i has counts[i]."""
    segments, at = [], 0
    for slot, group in groupby(zip(work, counts, strict=True), key=lambda pair: pair[0].seq.slot):
        stop = at + sum(n for _, n in group)
        if stop > at:
            segments.append(Segment(slot, at, stop))
        at = stop
    return tuple(segments)
