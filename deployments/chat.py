"""From what a replica sends to the answers of `/v1/chat/completions`. Pure: items in, answers out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from bitdelta_core.engine.api import PositionLogprobs, TokenEvent, TokenLogprob
from deployments.calls import Accepted
from deployments.completions import PromptItems
from deployments.finish import finish_of
from deployments.openai_api import ChatRequest
from deployments.openai_responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Tally,
    TokenLogprobs,
    TopLogprob,
    Usage,
    now,
)


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: TokenEvent | None = None


async def chat_completion(request: ChatRequest, request_id: str, model: str, items: PromptItems) -> ChatCompletion:
    """The whole answer."""
    tally, choices = Tally(), {}
    async with aclosing(items):
        async for _, item in items:
            _count(tally, item)
            if isinstance(item, TokenEvent):
                choice = choices.setdefault(item.index, _Choice())
                choice.text.append(item.text)
                choice.logprobs += _token_logprobs(item.logprobs)
                choice.last = item
    return ChatCompletion(
        id=request_id,
        object="chat.completion",
        created=now(),
        model=model,
        choices=[_chat_choice(request, index, choices[index]) for index in sorted(choices)],
        usage=tally.usage(),
    )


def _chat_choice(request: ChatRequest, index: int, choice: _Choice) -> ChatChoice:
    assert choice.last is not None
    return ChatChoice(
        index=index,
        message=ChatMessage(role="assistant", content="".join(choice.text)),
        logprobs=ChatLogprobs(content=choice.logprobs) if request.logprobs else None,
        **finish_of(choice.last),
    )


async def chat_chunks(
    request: ChatRequest, request_id: str, model: str, items: PromptItems
) -> AsyncGenerator[ChatCompletionChunk]:
    """The answer in pieces: each choice's role first; with `include_usage`, a last chunk of usage alone."""
    tally, started, created = Tally(), set(), now()

    def chunk(choices: list[ChatChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        answer = ChatCompletionChunk(
            id=request_id, object="chat.completion.chunk", created=created, model=model, choices=choices
        )
        return answer.model_copy(update={"usage": usage}) if usage else answer

    async with aclosing(items):
        async for _, item in items:
            _count(tally, item)
            if isinstance(item, Accepted):
                continue
            usage = tally.usage() if request.usage_in_every_chunk else None
            if item.index not in started:
                started.add(item.index)
                yield chunk([_opening(item.index)], usage)
            if item.text or item.logprobs or item.finish_reason:
                yield chunk([_piece(request, item)], usage)
    if request.include_usage:
        yield chunk([], tally.usage())


def _opening(index: int) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=index, delta=ChatDelta(role="assistant", content=""), logprobs=None, finish_reason=None
    )


def _piece(request: ChatRequest, event: TokenEvent) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=event.index,
        delta=ChatDelta(content=event.text) if event.text else ChatDelta(),
        logprobs=ChatLogprobs(content=_token_logprobs(event.logprobs)) if request.logprobs else None,
        **finish_of(event),
    )


def _count(tally: Tally, item: Accepted | TokenEvent) -> None:
    if isinstance(item, Accepted):
        tally.prompts[0] = item.prompt_tokens
    else:
        tally.completions[item.index] = item.completion_tokens
        tally.cached[0] = item.cached_tokens


def _token_logprobs(positions: Iterable[PositionLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(**_fields(position.chosen), top_logprobs=[TopLogprob(**_fields(top)) for top in position.top])
        for position in positions
    ]


def _fields(token: TokenLogprob) -> dict:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
