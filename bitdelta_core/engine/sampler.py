"""From logits to tokens. Shapes: L rows, V vocabulary, R rows that sample at random.

Order of work, as in vLLM: logit bias and min_tokens, then repetition, frequency and presence penalties; here the
log-probabilities are taken; then greedy rows take the best token, the others divide by the temperature and apply min-p,
top-k and top-p before one token is drawn.

Randomness is counter-based: the uniform number for a token is a hash of (seed, choice, position), and the token is read
off the row's own cumulative distribution. So a row's token depends on its logits, its seed and its position, not on its
neighbours, on what was drawn before, or on whether the sequence was preempted in between.

Not covered: beam search, grammars.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitdelta_core.engine.api import SamplingParams

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
        self.greedy = params.temperature == 0
        self._prompt = prompt
        self._vocab_size = vocab_size
        self._key = struct.pack("<QI", seed % 2**64, index)
        never = sorted(i for i in stop_ids | set(params.stop_token_ids) if i < vocab_size)
        self._stop_ids = torch.tensor(never, dtype=torch.int64)
        self._bias_ids = torch.tensor(list(params.logit_bias.keys()), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._counts_V: torch.Tensor | None = None
        self._seen_V: torch.Tensor | None = None
        self._counted = 0
        self._penalises = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1)

    @property
    def plain(self) -> bool:
        """Nothing but the best token of the unchanged logits is wanted."""
        return self.greedy and self.params.logprobs is None and not self.shapes

    @property
    def shapes(self) -> bool:
        """Whether the logits are changed before anything is read off them."""
        return self._penalises or bool(self.params.logit_bias) or self.params.min_tokens > 0

    def uniform(self, position: int) -> float:
        """In [0, 1): the random number for the token at `position`."""
        digest = hashlib.blake2b(struct.pack("<Q", position), digest_size=8, key=self._key).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53

    def shape(self, logits_V: torch.Tensor, generated: Sequence[int]) -> None:
        """Bias, min_tokens and penalties, in place. The row may be padded beyond the variant's vocabulary."""
        logits_V = logits_V[: self._vocab_size]
        if self.params.logit_bias:
            logits_V.index_add_(0, self._bias_ids.to(logits_V.device), self._bias.to(logits_V.device))
        if len(generated) < self.params.min_tokens:
            logits_V[self._stop_ids.to(logits_V.device)] = NEVER
        if self._penalises:
            self._penalise(logits_V, generated)

    def _penalise(self, logits_V: torch.Tensor, generated: Sequence[int]) -> None:
        counts_V, seen_V = self._count(generated, logits_V)
        factor = self.params.repetition_penalty
        penalised_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
        logits_V.copy_(torch.where(seen_V, penalised_V, logits_V))
        logits_V -= self.params.frequency_penalty * counts_V
        logits_V -= self.params.presence_penalty * (counts_V > 0)

    def _count(self, generated: Sequence[int], like_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._counts_V is None or self._seen_V is None:
            self._counts_V = torch.zeros_like(like_V)
            self._seen_V = torch.zeros_like(like_V, dtype=torch.bool)
            self._seen_V[torch.tensor(self._prompt, dtype=torch.int64, device=like_V.device)] = True
        fresh = torch.tensor(generated[self._counted :], dtype=torch.int64, device=like_V.device)
        self._counts_V.index_add_(0, fresh, torch.ones_like(fresh, dtype=like_V.dtype))
        self._seen_V[fresh] = True
        self._counted = len(generated)
        return self._counts_V, self._seen_V


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
    best_L, ids_L = logits_LV.max(dim=1)
    finite = torch.isfinite(best_L).tolist()
    random = [i for i, row in enumerate(rows) if finite[i] and not row.state.greedy]
    if random:
        ids_L[random] = _draw(logits_LV[random], [rows[i] for i in random]).to(ids_L.device)
    tokens = ids_L.tolist()
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


def _draw(logits_RV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Token ids, int64 [R]."""
    device = logits_RV.device
    params = [row.state.params for row in rows]
    temperature_R1 = torch.tensor([[p.temperature] for p in params], dtype=torch.float64, device=device)
    probs_RV = torch.softmax(logits_RV.double() / temperature_R1.clamp(min=1e-5), dim=1)
    probs_RV, order_RV = torch.sort(probs_RV, dim=1, descending=True, stable=True)
    keep_RV = _kept(probs_RV, params)
    mass_RV = torch.where(keep_RV, probs_RV, 0.0).cumsum(dim=1)
    uniform = [[row.state.uniform(row.position)] for row in rows]
    target_R1 = torch.tensor(uniform, dtype=torch.float64, device=device) * mass_RV[:, -1:]
    place_R1 = torch.searchsorted(mass_RV, target_R1, right=True)
    place_R1 = torch.minimum(place_R1, keep_RV.sum(dim=1, keepdim=True) - 1)
    return order_RV.gather(1, place_R1).squeeze(1)


def _kept(probs_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Which of the sorted probabilities survive min-p, top-k and top-p: always a prefix, never empty."""
    vocab, device = probs_RV.shape[1], probs_RV.device
    min_p_R1 = torch.tensor([[p.min_p] for p in params], dtype=torch.float64, device=device)
    top_k_R1 = torch.tensor([[p.top_k if p.top_k > 0 else vocab] for p in params], device=device)
    top_p_R1 = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)
    keep_RV = probs_RV >= min_p_R1 * probs_RV[:, :1]
    keep_RV &= torch.arange(vocab, device=device) < top_k_R1
    kept_RV = torch.where(keep_RV, probs_RV, 0.0)
    kept_RV /= kept_RV.sum(dim=1, keepdim=True)
    before_RV = kept_RV.cumsum(dim=1) - kept_RV
    keep_RV &= (before_RV < top_p_R1) | (top_p_R1 >= 1)
    keep_RV &= probs_RV > 0
    return keep_RV
