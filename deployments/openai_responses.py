"""What clients get: the OpenAI API's answers, as the official SDKs parse them. Unset fields are left out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    def to_json(self) -> str:
        """Without the fields that were never set; explicit nulls stay."""
        return self.model_dump_json(exclude_unset=True)


class PromptTokensDetails(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class CompletionLogprobs(Answer):
    """Four lists of one entry per token. The first token of an echoed prompt has no logprob."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class Completion(Answer):
    """Also one chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprobs]


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """`owner/name@version`, or the base's name."""
    parent: str | None
    """The base's name, for a variant."""
    max_model_len: int | None = None


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(Answer):
    prompt: str


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Answer):
    error: ErrorDetail


@dataclass
class Tally:
    """Tokens of one request: by prompt, and by choice."""

    prompts: dict[int, int] = field(default_factory=dict)
    completions: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)

    def usage(self) -> Usage:
        """Of everything so far."""
        return Usage.of(sum(self.prompts.values()), sum(self.completions.values()), sum(self.cached.values()))


def now() -> int:
    return int(time.time())
