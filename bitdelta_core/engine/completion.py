"""Blocking use: prompts in, completions out."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from bitdelta_core.engine.api import FinishReason, GenerationRequest, PositionLogprobs, TokenEvent
from bitdelta_core.errors import BitDeltaError, InvalidRequest, Overloaded

if TYPE_CHECKING:
    from bitdelta_core.engine.engine import Engine

Prompt: TypeAlias = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """One choice for one prompt."""

    prompt_token_ids: tuple[int, ...]
    delta: str | None
    index: int
    """Which of the n choices."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0

    def add(self, event: TokenEvent) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        self.cached_tokens = event.cached_tokens


def normalise(
    prompts: Prompt | Sequence[Prompt], delta: str | Sequence[str | None] | None, tokenizer: Callable[[str | None], Any]
) -> list[tuple[tuple[int, ...], str | None]]:
    """(token ids, variant) of each prompt."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    several: Sequence[Any] = [prompts] if single else prompts
    deltas = [delta] * len(several) if delta is None or isinstance(delta, str) else list(delta)
    if len(deltas) != len(several):
        raise InvalidRequest(f"{len(several)} prompts, but {len(deltas)} variants", param="delta")
    return [
        (tuple(tokenizer(d)(p)["input_ids"]) if isinstance(p, str) else tuple(p), d)
        for p, d in zip(several, deltas, strict=True)
    ]


def collect(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Completion]:
    """Run all requests, as many at a time as the engine takes on."""
    done: dict[tuple[str, int], Completion] = {
        (r.request_id, i): Completion(r.prompt_token_ids, r.delta, i) for r in requests for i in range(r.params.n)
    }
    inbox: queue.SimpleQueue[TokenEvent | BitDeltaError] = queue.SimpleQueue()
    waiting, running = deque(requests), 0
    try:
        while waiting or running:
            running += _submit_some(engine, waiting, running, inbox)
            event = inbox.get()
            if isinstance(event, BitDeltaError):
                raise event
            completion = done[event.request_id, event.index]
            if event.prompt_logprobs is not None:
                completion.prompt_logprobs = event.prompt_logprobs
                continue
            completion.add(event)
            running -= event.finish_reason is not None
    finally:
        for request in requests:
            engine.abort(request.request_id)
    return list(done.values())


def _submit_some(
    engine: Engine,
    waiting: deque[GenerationRequest],
    running: int,
    inbox: queue.SimpleQueue[TokenEvent | BitDeltaError],
) -> int:
    """Submit while there is room. Returns how many choices that was."""
    submitted = 0
    while waiting:
        try:
            engine.submit(waiting[0], inbox.put)
        except Overloaded:
            if running + submitted:
                return submitted
            raise
        submitted += waiting.popleft().params.n
    return submitted
