"""From logits to tokens. Shapes: L rows, V vocabulary, R rows of a table.

Order of work, as in vLLM: logit bias and min_tokens, then repetition, frequency and presence penalties; here the
log-probabilities are taken; then greedy rows take the best token, the others divide by the temperature and apply min-p,
top-k and top-p before one token is drawn. `kernels/sampling/reference.py` says exactly which token that is, and device
kernels draw the same one.

Randomness is counter-based: the uniform number for a token is a hash of (seed, choice, position), and the token is read
off the row's own cumulative distribution. So a row's token depends on its logits, its seed and its position, not on its
neighbours, on what was drawn before, or on whether the sequence was preempted in between.

Not covered: beam search, grammars.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bitdelta_core.engine.api import SamplingParams
from kernels.sampling import sample as draw
from kernels.sampling.reference import penalised
from kernels.sampling.rows import COLUMNS, FRACTION, PER_TOKEN, RowValues, Sampled, SamplingRows, Wants, start_counts

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class LogprobRow:
    """Ids and log-probabilities at one position: the chosen token's, its rank, and the best ones."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row gave. `finite` is False when its logits hold NaN or +inf, or exclude every token."""

    token_id: int
    finite: bool
    logprobs: LogprobRow | None = None


class RowState:
    """What sampling one sequence needs: its parameters, its random stream and the counts behind its penalties."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        vocab_size: int,
        stop_ids: frozenset[int],
        seed: int,
        index: int,
    ) -> None:
        self.params = params
        self.values = RowValues(
            vocab=vocab_size,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            repetition=params.repetition_penalty,
            logprob=params.logprobs is not None,
        )
        self._shaped = replace(self.values, presence=0.0, frequency=0.0, repetition=1.0, logprob=False)
        self._prompt = prompt
        self._key = struct.pack("<QI", seed % 2**64, index)
        never = sorted(i for i in stop_ids | set(params.stop_token_ids) if i < vocab_size)
        self._stop_ids = torch.tensor(never, dtype=torch.int64)
        self._bias_ids = torch.tensor(list(params.logit_bias.keys()), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._counts_1V: torch.Tensor | None = None
        self._counted = 0

    @property
    def plain(self) -> bool:
        """Nothing but the best token of the unchanged logits is wanted."""
        return self.values.greedy and self.params.logprobs is None and not self.shapes

    @property
    def shapes(self) -> bool:
        """Whether the logits are changed before anything is read off them."""
        return self.values.penalised or bool(self.params.logit_bias) or self.params.min_tokens > 0

    def uniform(self, position: int) -> float:
        """In [0, 1): the random number for the token at `position`. Sampling uses its first FRACTION bits."""
        digest = hashlib.blake2b(struct.pack("<Q", position), digest_size=8, key=self._key).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53

    def line(self, position: int) -> bytes:
        """Of the sampling table, for logits that `shape` has seen: nothing is left to penalise."""
        return self._shaped.pack(int(self.uniform(position) * 2**FRACTION))

    def shape(self, logits_V: torch.Tensor, generated: Sequence[int]) -> None:
        """Bias, min_tokens and penalties, in place. The row may be padded beyond the variant's vocabulary."""
        logits_V = logits_V[: self.values.vocab]
        if self.params.logit_bias:
            logits_V.index_add_(0, self._bias_ids.to(logits_V.device), self._bias.to(logits_V.device))
        if len(generated) < self.params.min_tokens:
            logits_V[self._stop_ids.to(logits_V.device)] = NEVER
        if self.values.penalised:
            fields_1F = table([self.values.pack(0, counts=0)], logits_V.device)
            logits_V.copy_(penalised(logits_V[None], fields_1F, self._count(generated, logits_V.device))[0])

    def _count(self, generated: Sequence[int], device: torch.device) -> torch.Tensor:
        """Counts up to the last generated token."""
        fresh = torch.tensor(generated[self._counted :], dtype=torch.int64, device=device)
        if self._counts_1V is None:
            self._counts_1V = torch.empty((1, self.values.vocab), dtype=torch.int32, device=device)
            start_counts(self._counts_1V, 0, torch.tensor(self._prompt, dtype=torch.int64, device=device), fresh)
        else:
            self._counts_1V[0].index_add_(0, fresh, torch.full_like(fresh, PER_TOKEN, dtype=torch.int32))
        self._counted = len(generated)
        return self._counts_1V


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits that wants a token: the sampling state, the tokens generated so far, the position to fill."""

    state: RowState
    generated: Sequence[int]
    position: int


def sample(logits_LV: torch.Tensor, rows: Sequence[Row]) -> list[Sample]:
    """One token per row. `logits_LV` is float32 and may be overwritten."""
    if all(row.state.plain for row in rows):
        best_L, ids_L = logits_LV.max(dim=1)
        finite = torch.isfinite(best_L).tolist()
        return [Sample(token, ok) for token, ok in zip(ids_L.tolist(), finite, strict=True)]
    for i, row in enumerate(rows):
        if row.state.shapes:
            row.state.shape(logits_LV[i], row.generated)
    lines = table([row.state.line(row.position) for row in rows], logits_LV.device)
    out = Sampled.empty(len(rows), logits_LV.device)
    draw(logits_LV, SamplingRows(lines), None, out, None, Wants(), impl="reference")
    tokens, finite = out.token_S.tolist(), out.finite_S.bool().tolist()
    wanted = {i: n for i, row in enumerate(rows) if finite[i] and (n := row.state.params.logprobs) is not None}
    logprobs = _logprobs(logits_LV, tokens, wanted)
    return [Sample(tokens[i], finite[i], logprobs.get(i)) for i in range(len(rows))]


def logprob_rows(logits_LV: torch.Tensor, tokens: Sequence[int], top: int) -> list[LogprobRow]:
    """Log-probabilities (nats) of `tokens`, one per row, with the `top` best of each row."""
    found = _logprobs(logits_LV, tokens, dict.fromkeys(range(len(tokens)), top))
    return [found[i] for i in range(len(tokens))]


def _logprobs(logits_LV: torch.Tensor, tokens: Sequence[int], wanted: dict[int, int]) -> dict[int, LogprobRow]:
    if not wanted:
        return {}
    index = list(wanted)
    logprobs_RV = torch.log_softmax(logits_LV[index].float(), dim=1)
    chosen_R1 = logprobs_RV.gather(1, torch.tensor([[tokens[i]] for i in index], device=logits_LV.device))
    ranks = ((logprobs_RV > chosen_R1).sum(dim=1) + 1).tolist()
    values, ids = torch.topk(logprobs_RV, min(max(wanted.values()), logits_LV.shape[1]), dim=1)
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return {
        i: LogprobRow(tokens[i], value, rank, tuple(top[: wanted[i]]))
        for i, (value,), rank, top in zip(index, chosen_R1.tolist(), ranks, tops, strict=True)
    }


def table(lines: Sequence[bytes], device: torch.device) -> torch.Tensor:
    """Lines of the sampling table, int32 [R, COLUMNS]."""
    return torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.int32).view(-1, COLUMNS).to(device)
