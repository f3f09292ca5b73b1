"""What sampling is given and gives back, one row per sequence, at fixed addresses.

Everything of a row lies in one table line of 64 bytes, so that a step's lines travel with the step's other metadata in
one copy. Numbers that decide which token is drawn are integers, or floats made on the host: device and CPU compute the
same from them, bit for bit.

Shapes: S rows, V vocabulary (the widest row's), Q running sequences with penalties.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum

import torch

COLUMNS = 16
"""Width of a table line: a power of two, beyond the last RowField unused."""
FRACTION = 31
"""`uniform` and `top_p` count units of 2^-31."""
MIN_TEMPERATURE = 1e-5
PROMPT_SEEN = 1
PER_TOKEN = 2
"""A count is PER_TOKEN * how often the token was generated + (PROMPT_SEEN if the prompt has it)."""
UNCOUNTED = -1
"""The counts row of a row without penalties."""


class RowField(IntEnum):
    """int32, except where it says float32 (the same bits)."""

    SCALE = 0
    """float32: log2(e) / temperature; 0: greedy"""
    REACH = 1
    """float32: -log2(min_p), inf without: weights further below the best (in octaves) are left out"""
    TOP_K = 2
    """0: all"""
    TOP_P = 3
    """In units of 2^-FRACTION; 0: all"""
    UNIFORM = 4
    """The row's random number in [0, 1), in units of 2^-FRACTION"""
    PRESENCE = 5
    """float32"""
    FREQUENCY = 6
    """float32"""
    REPETITION = 7
    """float32"""
    INVERSE = 8
    """float32: 1 / repetition"""
    COUNTS = 9
    """The row of the counts, or UNCOUNTED: no penalties"""
    VOCAB = 10
    """Columns of the logits that are this row's; 0: the row is left alone (padding, or sampled apart)"""
    LOGPROB = 11
    """1: the chosen token's log-probability and rank are wanted"""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How every row of a step is sampled."""

    fields_SF: torch.Tensor
    """int32 [S, COLUMNS], contiguous"""

    @classmethod
    def empty(cls, rows: int, device: torch.device | str) -> SamplingRows:
        """Rows that are all left alone."""
        return cls(torch.zeros((rows, COLUMNS), dtype=torch.int32, device=device))


@dataclass(frozen=True, slots=True)
class Wants:
    """What a step's rows may want: kernels for the rest are not launched. Part of a graph's key. A row that wants more
    than this is answered with `finite` = 0, never with a token."""

    random: bool = True
    """Some row is not greedy"""
    truncated: bool = True
    """Some row has top-k or top-p (only with `random`)"""
    ranks: bool = True
    """Some row that is not greedy wants a log-probability (only with `random`)"""

    def __or__(self, other: Wants) -> Wants:
        """What a graph that serves both must be captured for."""
        ranks = self.ranks or other.ranks
        return Wants(self.random or other.random, self.truncated or other.truncated, ranks)


GREEDY = Wants(random=False, truncated=False, ranks=False)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Written for rows whose VOCAB is not 0; others keep what they hold."""

    words_4S: torch.Tensor
    """int32 [4, S], contiguous: one copy brings all of it to the host"""

    @classmethod
    def empty(cls, rows: int, device: torch.device | str) -> Sampled:
        return cls(torch.zeros((4, rows), dtype=torch.int32, device=device))

    @property
    def token_S(self) -> torch.Tensor:
        """The tokens; 0 where the row is not finite. `StepRows.source_T` of the next step refers to them."""
        return self.words_4S[0]

    @property
    def finite_S(self) -> torch.Tensor:
        """0: the row's logits hold NaN or +inf, or exclude every token."""
        return self.words_4S[1]

    @property
    def rank_S(self) -> torch.Tensor:
        """1: no token was likelier. Written where LOGPROB is set and the row is finite."""
        return self.words_4S[2]

    @property
    def logprob_S(self) -> torch.Tensor:
        """float32, nats, of the distribution before the temperature. Written with `rank_S`."""
        return self.words_4S[3].view(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowValues:
    """One line of the table, as a host knows it. Ranges are those of `SamplingParams`."""

    vocab: int
    temperature: float = 1.0
    """0: greedy"""
    top_k: int = 0
    """<= 0: off"""
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    logprob: bool = False

    @property
    def greedy(self) -> bool:
        """The best token is the only one that can be drawn."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return (self.presence, self.frequency, self.repetition) != (0, 0, 1)

    @property
    def wants(self) -> Wants:
        random = not self.greedy
        truncated = 0 < self.top_k < self.vocab or self.top_p < 1
        return Wants(random=random, truncated=random and truncated, ranks=random and self.logprob)

    def pack(self, uniform: int, counts: int = UNCOUNTED) -> bytes:
        """The table line. `uniform` in units of 2^-FRACTION; `counts` the row of the counts, for penalised rows."""
        assert 0 <= uniform < 2**FRACTION, uniform
        assert self.penalised or counts == UNCOUNTED, "a row of counts, but no penalties"
        assert not self.penalised or counts >= 0, "penalties, but no row of counts"
        return struct.pack(
            "<2f3i4f3i16x",
            0.0 if self.greedy else math.log2(math.e) / max(self.temperature, MIN_TEMPERATURE),
            -math.log2(self.min_p) if self.min_p > 0 else math.inf,
            self.top_k if 0 < self.top_k < self.vocab else 0,
            self._packed_top_p(),
            uniform,
            self.presence,
            self.frequency,
            self.repetition,
            1 / self.repetition,
            counts,
            self.vocab,
            self.logprob,
        )

    def _packed_top_p(self) -> int:
        """In units of 2^-FRACTION; 0: everything, as for what is that but for rounding."""
        share = max(1, round(self.top_p * 2**FRACTION))
        return share if share < 2**FRACTION else 0


def start_counts(counts_QV: torch.Tensor, row: int, prompt: torch.Tensor, generated: torch.Tensor) -> None:
    """A sequence takes over a row of the counts. Between steps, on the stream that runs them; does not wait.

    Args:
        counts_QV: int32.
        prompt: int64 ids on the counts' device.
        generated: int64 ids of what it has generated before (a sequence that was preempted).
    """
    counts_V = counts_QV[row]
    counts_V.zero_()
    counts_V.index_fill_(0, prompt, PROMPT_SEEN)
    counts_V.index_add_(0, generated, torch.full_like(generated, PER_TOKEN, dtype=counts_V.dtype))
