"""How a step's rows are sampled on the device, and where their tokens stand.

Every row with logits has a line of the sampling table, which travels with the step's metadata. Rows with a logit bias,
with too few tokens to stop yet, or with alternatives to report are sampled apart, right behind their pass: their lines
there are empty, their logits are copied and shaped first. Nothing waits, and the next step finds all tokens alike.

`words` holds what all rows of one step sampled, in regions of (4, rows): the decode pass's first, at an address that
graphs know, then those of wide passes and of rows apart as they come. A token's place is its index in `words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitdelta_core.engine.accelerator import Accelerator
from bitdelta_core.engine.pieces import Piece
from bitdelta_core.engine.runner import Task
from bitdelta_core.engine.sampler import LogprobRow, Sample
from bitdelta_core.engine.sequence import Sequence as EngineSequence
from kernels.sampling import sample
from kernels.sampling.reference import penalised
from kernels.sampling.rows import (
    FRACTION,
    GREEDY,
    UNCOUNTED,
    Sampled,
    SamplingRows,
    Wants,
    start_counts,
)
from kernels.sampling.workspace import Workspace

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Place:
    """Row `row` of a region of `rows` that begins at `offset` of the words."""

    offset: int
    rows: int
    row: int

    @property
    def token(self) -> int:
        """Index of the token."""
        return self.offset + self.row

    def read(self, words: np.ndarray, top: tuple[tuple[int, float], ...] | None) -> Sample:
        """What the row gave. `top`: the alternatives, when log-probabilities are wanted."""
        token, finite, rank, logprob = words[self.token : self.offset + 4 * self.rows : self.rows]
        if top is None or not finite:
            return Sample(int(token), bool(finite))
        value = float(np.array(logprob, np.int32).view(np.float32))
        return Sample(int(token), True, LogprobRow(int(token), value, int(rank), top))


@dataclass(frozen=True, slots=True)
class Tops:
    """The best alternatives of some rows, on their way to the host."""

    ids: torch.Tensor
    logprobs: torch.Tensor

    def of(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        return tuple(zip(self.ids[row, :count].tolist(), self.logprobs[row, :count].tolist(), strict=True))


class DeviceSampler:
    """The table of counts, the words, and the working memory of sampling."""

    def __init__(
        self, accelerator: Accelerator, *, vocab: int, decode_rows: int, wide_rows: int, pass_rows: int, sequences: int
    ) -> None:
        """Args:
        vocab: columns of logits.
        decode_rows: of the largest decode pass.
        wide_rows: rows with logits of all wide passes of a step.
        pass_rows: the most rows with logits of one pass.
        sequences: running together.
        """
        device = accelerator.device
        self.words = torch.zeros(4 * (decode_rows + wide_rows + sequences), dtype=torch.int32, device=device)
        self.counts_QV = torch.zeros((sequences, vocab), dtype=torch.int32, device=device)
        self.workspace = Workspace.empty(pass_rows, vocab, device)
        self.places: dict[int, Place] = {}
        """Of this step, by task."""
        self.tops: dict[int, tuple[Tops, int]] = {}
        """Alternatives, and which row of them, by task."""
        self._accelerator = accelerator
        self._behind_decode = 4 * decode_rows
        self._at = self._behind_decode
        self._counted: dict[EngineSequence, tuple[int, int]] = {}
        """Row of the counts, and the sequence's preemptions when it took it."""
        self._free = list(range(sequences))

    @property
    def nbytes(self) -> int:
        tensors = [getattr(self.workspace, name) for name in self.workspace.__slots__ if name != "config"]
        return sum(t.nbytes for t in (self.words, self.counts_QV, *tensors))

    def begin(self, tasks: Sequence[Task]) -> None:
        """A new step."""
        self.places, self.tops, self._at = {}, {}, self._behind_decode
        self._hold_counts([t for t in tasks if t.work.samples and t.state.values.penalised])

    def wants(self, pieces: Sequence[Piece]) -> Wants:
        """What the lines of one pass want."""
        found = GREEDY
        for _, piece in _sampling_rows(pieces):
            if not piece.apart:
                found |= piece.task.state.values.wants
        return found

    def write_lines(self, sampling_LF: np.ndarray, pieces: Sequence[Piece]) -> None:
        """Of one pass."""
        for row, piece in _sampling_rows(pieces):
            if not piece.apart:
                sampling_LF[row] = self._line(piece.task)

    def decode_region(self, rows: int) -> Sampled:
        return Sampled(self.words[: 4 * rows].view(4, rows))

    def note_decode(self, pieces: Sequence[Piece], rows: int) -> None:
        """A decode pass of that many rows has been launched."""
        self._note(pieces, 0, rows)

    def sample_wide(self, pieces: Sequence[Piece], logits_LV: torch.Tensor, lines: SamplingRows) -> None:
        """Behind a wide pass."""
        rows = logits_LV.shape[0]
        if rows and any(piece.samples for piece in pieces):
            self._note(pieces, self._at, rows)
            out, wants = self._region(rows), self.wants(pieces)
            sample(logits_LV, lines, self.counts_QV, out, self.workspace, wants)

    def sample_padding(self, logits_LV: torch.Tensor, lines: SamplingRows) -> None:
        """To warm up: rows whose lines are empty."""
        out = Sampled.empty(logits_LV.shape[0], logits_LV.device)
        sample(logits_LV, lines, self.counts_QV, out, self.workspace, Wants())

    def sample_apart(self, pieces: Sequence[Piece], logits_LV: torch.Tensor) -> None:
        """Behind a pass: the rows that it left alone."""
        picked = [(row, piece) for row, piece in _sampling_rows(pieces) if piece.apart]
        if not picked:
            return
        apart = [piece for _, piece in picked]
        shaped_RV = logits_LV.index_select(0, self._ids([row for row, _ in picked]))
        for row_V, piece in zip(shaped_RV, apart, strict=True):
            self._shape(row_V, piece.task)
        lines = np.stack([self._line(piece.task) for piece in apart])
        fields_RF = self._accelerator.to_device(torch.from_numpy(lines))
        self._find_tops(apart, shaped_RV, fields_RF)
        for row, piece in enumerate(apart):
            self.places[piece.index] = Place(self._at, len(apart), row)
        region = self._region(len(apart))
        sample(shaped_RV, SamplingRows(fields_RF), self.counts_QV, region, self.workspace, Wants())

    def _note(self, pieces: Sequence[Piece], offset: int, rows: int) -> None:
        for row, piece in _sampling_rows(pieces):
            self.places[piece.index] = Place(offset, rows, row)

    def _region(self, rows: int) -> Sampled:
        start, self._at = self._at, self._at + 4 * rows
        assert self._at <= self.words.numel(), "more rows are sampled than there is room for"
        return Sampled(self.words[start : self._at].view(4, rows))

    def _shape(self, logits_V: torch.Tensor, task: Task) -> None:
        """Bias and min_tokens, in place."""
        params, seq = task.state.params, task.work.seq
        if params.logit_bias:
            bias = self._accelerator.to_device(torch.tensor(list(params.logit_bias.values()), dtype=torch.float32))
            logits_V.index_add_(0, self._ids(list(params.logit_bias)), bias)
        if task.work.stop - seq.prompt_len < params.min_tokens:
            stops = task.variant.vocabulary.stop_ids | set(params.stop_token_ids)
            logits_V.index_fill_(0, self._ids(sorted(i for i in stops if i < task.variant.vocab_size)), NEVER)

    def _find_tops(self, apart: Sequence[Piece], shaped_RV: torch.Tensor, fields_RF: torch.Tensor) -> None:
        """Of the logits after penalties, before the token is counted."""
        wanted = [piece.task.state.params.logprobs or 0 for piece in apart]
        if not any(wanted):
            return
        counted = [i for i, piece in enumerate(apart) if piece.task.state.values.penalised]
        if counted:
            rows = self._ids(counted)
            after_RV = penalised(shaped_RV[rows], fields_RF[rows], self.counts_QV)
            shaped_RV = shaped_RV.index_copy(0, rows, after_RV)
        logprobs, ids = torch.topk(torch.log_softmax(shaped_RV, dim=1), min(max(wanted), shaped_RV.shape[1]), dim=1)
        tops = Tops(self._accelerator.to_host(ids), self._accelerator.to_host(logprobs))
        self.tops |= {piece.index: (tops, row) for row, piece in enumerate(apart) if wanted[row]}

    def _line(self, task: Task) -> np.ndarray:
        """int32 [COLUMNS]"""
        state, row = task.state, UNCOUNTED
        if state.values.penalised:
            row, _ = self._counted[task.work.seq]
        return np.frombuffer(state.values.pack(int(state.uniform(task.work.stop) * 2**FRACTION), row), np.int32)

    def _hold_counts(self, tasks: Sequence[Task]) -> None:
        """Rows of sequences that have ended or were preempted are free: steps that still write them come first."""
        for seq, (row, life) in list(self._counted.items()):
            if not seq.admitted or seq.preemptions != life:
                del self._counted[seq]
                self._free.append(row)
        for task in tasks:
            seq = task.work.seq
            if seq not in self._counted:
                row = self._free.pop()
                self._counted[seq] = (row, seq.preemptions)
                prompt, generated = self._ids(seq.tokens[: seq.prompt_len]), self._ids(seq.tokens[seq.prompt_len :])
                start_counts(self.counts_QV, row, prompt, generated)

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return self._accelerator.to_device(torch.tensor(ids, dtype=torch.int64))

    def check_integrity(self) -> None:
        """Assert that every row of the counts has one owner or none."""
        rows = [row for row, _ in self._counted.values()]
        assert sorted([*rows, *self._free]) == list(range(self.counts_QV.shape[0])), "a row of counts is lost"


def _sampling_rows(pieces: Sequence[Piece]) -> list[tuple[int, Piece]]:
    """(row among those with logits, piece) of the pieces that end with a new token."""
    found, at = [], 0
    for piece in pieces:
        at += piece.logits
        if piece.samples:
            found.append((at - 1, piece))
    return found
