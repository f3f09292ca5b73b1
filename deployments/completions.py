"""From what replicas send to the answers of `/v1/completions`. Pure: items in, answers out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from bitdelta_core.engine.api import PositionLogprobs, TokenEvent
from deployments.calls import Accepted
from deployments.finish import finish_of
from deployments.openai_api import CompletionRequest
from deployments.openai_responses import Completion, CompletionChoice, CompletionLogprobs, Tally, Usage, now

PromptItems = AsyncGenerator[tuple[int, Accepted | TokenEvent]]
"""Closed by whoever is given it."""


async def completion(request: CompletionRequest, request_id: str, model: str, items: PromptItems) -> Completion:
    """The whole answer."""
    writer = _Writer(request, request_id, model)
    async with aclosing(items):
        async for prompt, item in items:
            writer.add(prompt, item)
    choices = [writer.merged(index) for index in sorted(writer.pieces)]
    return writer.answer(choices, usage=writer.tally.usage())


async def completion_chunks(
    request: CompletionRequest, request_id: str, model: str, items: PromptItems
) -> AsyncGenerator[Completion]:
    """The answer in pieces; with `include_usage`, a last one that has no choices but the usage."""
    writer = _Writer(request, request_id, model)
    async with aclosing(items):
        async for prompt, item in items:
            piece = writer.add(prompt, item)
            if piece is not None:
                usage = writer.tally.usage() if request.usage_in_every_chunk else None
                yield writer.answer([piece], usage)
    if request.include_usage:
        yield writer.answer([], usage=writer.tally.usage())


@dataclass
class _Writer:
    request: CompletionRequest
    request_id: str
    model: str
    tally: Tally = field(default_factory=Tally)
    pieces: dict[int, list[CompletionChoice]] = field(default_factory=dict)
    """By choice index; only the whole answer reads them back."""
    _accepted: dict[int, Accepted] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)
    _prompt_logprobs: dict[int, Sequence[PositionLogprobs | None]] = field(default_factory=dict)
    _created: int = field(default_factory=now)

    def answer(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        answer = Completion(
            id=self.request_id,
            object="text_completion",
            created=self._created,
            model=self.model,
            choices=choices,
        )
        return answer.model_copy(update={"usage": usage}) if usage else answer

    def add(self, prompt: int, item: Accepted | TokenEvent) -> CompletionChoice | None:
        """What this item adds to the answer, None when that is nothing."""
        if isinstance(item, Accepted):
            self._accepted[prompt] = item
            self.tally.prompts[prompt] = item.prompt_tokens
            return None
        if item.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = item.prompt_logprobs
        self.tally.cached[prompt] = item.cached_tokens
        if not item.token_ids and item.finish_reason is None:
            return None
        piece = self._piece(prompt, prompt * self.request.n + item.index, item)
        if piece is not None and not self.request.stream:
            self.pieces.setdefault(piece.index, []).append(piece)
        return piece

    def _piece(self, prompt: int, index: int, event: TokenEvent) -> CompletionChoice | None:
        generated = self.request.max_tokens > 0
        self.tally.completions[index] = event.completion_tokens if generated else 0
        text, positions = "", []
        if index not in self._offsets:
            self._offsets[index] = 0
            if self.request.echo:
                text, positions = self._echo(prompt)
        if generated:
            text += event.text
            positions += [(position.chosen.text, position) for position in event.logprobs]
        if not text and not positions and event.finish_reason is None:
            return None
        logprobs = None if self.request.logprobs is None else self._logprobs(index, positions)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, **finish_of(event, generated=generated))

    def _echo(self, prompt: int) -> tuple[str, list[tuple[str, PositionLogprobs | None]]]:
        accepted = self._accepted[prompt]
        positions = self._prompt_logprobs.get(prompt, ())
        return accepted.prompt_text, [(p.chosen.text if p else accepted.first_token_text, p) for p in positions]

    def _logprobs(self, index: int, positions: list[tuple[str, PositionLogprobs | None]]) -> CompletionLogprobs:
        offsets = []
        for text, _ in positions:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return CompletionLogprobs(
            text_offset=offsets,
            tokens=[text for text, _ in positions],
            token_logprobs=[p.chosen.logprob if p else None for _, p in positions],
            top_logprobs=[_top(p) if p else None for _, p in positions],
        )

    def merged(self, index: int) -> CompletionChoice:
        """All pieces of a choice as one."""
        pieces = self.pieces[index]
        last = pieces[-1]
        return last.model_copy(
            update={"text": "".join(p.text for p in pieces), "logprobs": _joined([p.logprobs for p in pieces])}
        )


def _top(position: PositionLogprobs) -> dict[str, float]:
    """The chosen token and the best alternatives. Tokens with the same text: the chosen, else the best one stands."""
    top = {position.chosen.text: position.chosen.logprob}
    for other in position.top:
        top.setdefault(other.text, other.logprob)
    return top


def _joined(parts: Sequence[CompletionLogprobs | None]) -> CompletionLogprobs | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return CompletionLogprobs(
        **{name: [x for part in present for x in getattr(part, name)] for name in CompletionLogprobs.model_fields}
    )
