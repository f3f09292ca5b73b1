"""Which sampling parameters are in range. Ranges are those of vLLM and the OpenAI API. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bitdelta_core.errors import InvalidRequest

if TYPE_CHECKING:
    from bitdelta_core.engine.api import SamplingParams

MAX_CHOICES = 128
MAX_LOGPROBS = 100
MAX_ID = 2**31 - 1
"""Of what becomes an element of a tensor."""
MAX_STOPS = 64
MIN_REPETITION = 0.01
"""Far below it the inverse is beyond 32-bit floats."""
MAX_STOP_CHARACTERS = 1024


def check(params: SamplingParams) -> None:
    """Raise InvalidRequest for the first parameter that is out of range."""
    _whole("n", params.n, 1, MAX_CHOICES)
    _whole("max_tokens", params.max_tokens, 1, None)
    _whole("min_tokens", params.min_tokens, 0, None)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be <= max_tokens={params.max_tokens}, got {params.min_tokens}", param="min_tokens"
        )
    _between("temperature", params.temperature, 0, 2)
    _between("top_p", params.top_p, 0, 1, open_low=True)
    _whole("top_k", params.top_k, -1, MAX_ID)
    _between("min_p", params.min_p, 0, 1)
    _between("presence_penalty", params.presence_penalty, -2, 2)
    _between("frequency_penalty", params.frequency_penalty, -2, 2)
    _between("repetition_penalty", params.repetition_penalty, MIN_REPETITION, 2)
    _whole("seed", params.seed, -(2**63), 2**64 - 1)
    _whole("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _whole("prompt_logprobs", params.prompt_logprobs, 0, MAX_LOGPROBS)
    _check_bias(params.logit_bias.items())
    _check_stops(params)


def _whole(name: str, value: int | None, low: int, high: int | None) -> None:
    if value is None and name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a whole number, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        limits = f">= {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {limits}, got {value}", param=name)


def _between(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidRequest(f"{name} must be in {bracket}{low}, {high}], got {value!r}", param=name)


def _check_bias(items: Iterable[tuple[int, float]]) -> None:
    for token, bias in items:
        if not isinstance(token, int) or token < 0:
            raise InvalidRequest(f"logit_bias keys must be token ids, got {token!r}", param="logit_bias")
        _between("logit_bias", bias, -100, 100)


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOPS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOPS} strings, got {len(params.stop)}", param="stop")
    for text in params.stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop strings must have 1 to {MAX_STOP_CHARACTERS} characters, got {str(text)[:50]!r}", param="stop"
            )
    for token in params.stop_token_ids:
        _whole("stop_token_ids", token, 0, MAX_ID)
