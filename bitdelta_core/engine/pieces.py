"""A step's work cut into what a device decoder takes in one pass, and written into its buffers.

Rows of sequences that compute one row go into one decode pass. The rest, chunks of prompts, go into wide passes, of
which each gives logits for MAX_ROWS rows at most: a prompt whose log-probabilities are wanted takes several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from bitdelta_core.engine.runner import Task
from bitdelta_core.engine.sequence import Sequence as EngineSequence
from bitdelta_core.models.device.decoder import MAX_ROWS
from bitdelta_core.models.device.step import HostStep
from kernels.device import segment_table


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of one task."""

    index: int
    """Of the task in its step"""
    task: Task
    start: int
    stop: int
    logits: int
    """How many of its last rows have logits"""
    samples: bool
    """Whether a new token follows it"""
    apart: bool
    """Whether that token is sampled apart: see `DeviceSampler`"""

    @property
    def entry(self) -> int:
        """Of the variant in the device tables; 0: the base."""
        return self.task.work.seq.slot + 1

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def unseen(self) -> bool:
        """Whether the host does not know the last row's token."""
        return self.stop > len(self.task.work.seq.tokens)


def cut(tasks: Sequence[Task]) -> tuple[list[Piece], list[list[Piece]]]:
    """The decode pass, which may be empty, and the wide passes. Each in the order of the tasks."""
    narrow, wide, room = [], [], 0
    for i, task in enumerate(tasks):
        w = task.work
        if w.rows == 1 and not w.prompt_logprobs:
            narrow.append(_piece(i, task, w.start, w.stop, 1))
            continue
        for piece in _chunks(i, task):
            if not wide or piece.logits > room:
                wide.append([])
                room = MAX_ROWS
            wide[-1].append(piece)
            room -= piece.logits
    return narrow, wide


def _chunks(index: int, task: Task) -> list[Piece]:
    w = task.work
    if not w.prompt_logprobs:
        return [_piece(index, task, w.start, w.stop, int(w.samples))]
    starts = range(w.start, w.stop, MAX_ROWS)
    return [_piece(index, task, a, b, b - a) for a in starts for b in [min(a + MAX_ROWS, w.stop)]]


def _piece(index: int, task: Task, start: int, stop: int, logits: int) -> Piece:
    samples = task.work.samples and stop == task.work.stop
    return Piece(index, task, start, stop, logits, samples, samples and _is_apart(task))


def _is_apart(task: Task) -> bool:
    """The device's table has no column for a bias, tokens that are excluded, or alternatives."""
    params, generated = task.state.params, task.work.stop - task.work.seq.prompt_len
    return bool(params.logit_bias or params.logprobs or generated < params.min_tokens)


Spans = list[tuple[int, int, int]]
"""(entry, first row, row after the last)"""


def spans(pieces: Sequence[Piece], counts: Sequence[int]) -> Spans:
    """Runs of one entry, over rows of which piece i has counts[i]."""
    found, at = [], 0
    for entry, group in groupby(zip(pieces, counts, strict=True), key=lambda pair: pair[0].entry):
        stop = at + sum(n for _, n in group)
        if stop > at:
            found.append((entry, at, stop))
        at = stop
    return found


def write(
    host: HostStep, pieces: Sequence[Piece], block_size: int, place_of: Mapping[EngineSequence, int], *, wide: bool
) -> tuple[Spans, Spans]:
    """Fill in what the pieces are, their sampling apart.

    Args:
        place_of: where the last step's token of a sequence is, among all of the device's sampled tokens.
        wide: of a wide step, whose linears go by tiles of rows: only the head's segments are written.

    Returns:
        The runs of entries, over rows and over rows with logits.
    """
    counts = np.fromiter((p.rows for p in pieces), np.int64, len(pieces))
    starts = [0, *accumulate(int(n) for n in counts)]
    total = starts[-1]
    owner = np.repeat(np.arange(len(pieces)), counts)
    first = np.fromiter((p.start for p in pieces), np.int64, len(pieces)) - np.array(starts[:-1])
    positions = np.arange(total) + first[owner]
    for i, p in enumerate(pieces):
        seq = p.task.work.seq
        host.block_tables_SM[i, : len(seq.table)] = np.asarray(seq.table)
        known = seq.tokens[p.start : p.stop]
        host.tokens_T[starts[i] : starts[i] + len(known)] = known
        if p.unseen:
            host.source_T[starts[i + 1] - 1] = place_of[seq]
        host.entry_T[starts[i] : starts[i + 1]] = p.entry
        host.context_lens_S[i] = p.stop
    block, offset = np.divmod(positions, block_size)
    host.positions_T[:total] = positions
    host.kv_slots_T[:total] = host.block_tables_SM[owner, block] * block_size + offset
    host.set_starts(starts)
    logits = [p.logits for p in pieces]
    ends = zip(starts[1:], logits, strict=True)
    host.logit_rows_L[: sum(logits)] = [row for stop, n in ends for row in range(stop - n, stop)]
    runs, logit_runs = spans(pieces, counts.tolist()), spans(pieces, logits)
    tables = [(host.logit_segments_G4, segment_table(logit_runs))]
    if not wide:
        tables.append((host.segments_G4, segment_table(runs)))
    for segments_G4, table in tables:
        segments_G4[: len(table)] = np.array(table).reshape(-1, 4)
    return runs, logit_runs
