"""What callers hand to the engine and what they get back. No torch, no Ray: it travels between processes by pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens. Names, defaults and ranges are those of vLLM and the OpenAI API; `validate()` checks."""

    n: int = 1
    max_tokens: int | None = None
    """None: up to the end of the context."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """How many alternatives per generated token; 0: the chosen one only; None: no logprobs."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (what `echo` with `logprobs` asks for)."""

    def validate(self) -> None:
        """Raise InvalidRequest naming the first parameter that is out of range."""
        from bitdelta_core.engine.sampling_rules import check

        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt for one variant. `n` choices share the prompt's KV blocks."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    delta: str | None = None
    """sha256 of the variant's delta; None: the bare base."""
    tenant: str = ""
    """Whose share of the engine this request counts against."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability (nats, after penalties and bias but before temperature) and its rank, 1 is best."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLogprobs:
    """The token that stands at a position, and the best alternatives there, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """What one step brought to one choice. The texts of a choice's events, joined, are its text.

    The first event of a request may carry no tokens but `prompt_logprobs` (position 0 is None: nothing precedes it).
    The last event of each choice has `finish_reason` set. `text` never ends in half a character or in a possible
    beginning of a stop string; it may therefore be empty while `token_ids` is not.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()
    """One per entry of token_ids, when asked for."""
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the choice; None for end-of-sequence and length."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in the prefix cache."""
    completion_tokens: int = 0
    """Tokens of this choice so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot for metrics and health. Byte counts are exact."""

    running: int = 0
    waiting: int = 0
    waiting_for_delta: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    slab_bytes_total: int = 0
    slab_bytes_used: int = 0
    resident: tuple[str, ...] = ()
    """sha256 of each delta that is READY, most recently used last."""
    pinned: tuple[str, ...] = ()
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    preemptions_total: int = 0
    delta_loads_total: int = 0
    delta_load_failures_total: int = 0
    delta_evictions_total: int = 0
    steps_total: int = 0
    kernels_compiled_total: int = 0
    """Of this process, those of the start included. After it, each was a pause of seconds."""
    kernel_compile_seconds_total: float = 0.0
