"""What clients may send: the OpenAI API's completions and chat requests, with vLLM's extras.

Types are checked here; ranges are the engine's (`SamplingParams.validate`), so they hold for every way in. A parameter
is obeyed or refused by its name (`openai_fields.py`), never accepted and ignored. (`user` is made to have no effect on
the answer, and has none.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitdelta_core.engine.api import SamplingParams
from bitdelta_core.errors import InvalidRequest
from deployments.calls import ChatPrompt
from deployments.openai_fields import NEUTRAL_IN_BOTH, NEUTRAL_IN_CHAT, NEUTRAL_IN_COMPLETIONS, take_supported

MAX_ERRORS = 10
MAX_SHOWN = 200
DEFAULT_COMPLETION_TOKENS = 16
MAX_PROMPTS = 1024
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_RESERVED = (
    "add_generation_prompt chat_template continue_final_message conversation documents max_length messages padding "
    "processor_kwargs return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools "
    "truncation"
)
RESERVED_TEMPLATE_KWARGS = frozenset(_RESERVED.split())


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


AnyBody = TypeVar("AnyBody", bound=_Body)


def parse_body(kind: type[AnyBody], body: Any) -> AnyBody:
    """Validate what JSON gave.

    Raises:
        InvalidRequest: with at most MAX_ERRORS problems in one message, each input cut to MAX_SHOWN characters;
            `param` names the first.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(f"The request body must be a JSON object, got {type(body).__name__}.")
    try:
        return kind.model_validate(take_supported(body, kind.NEUTRAL))
    except ValidationError as error:
        raise _as_invalid_request(error) from None


def _as_invalid_request(error: ValidationError) -> InvalidRequest:
    problems = error.errors(include_url=False, include_context=False)
    lines = [_problem_line(problem) for problem in problems[:MAX_ERRORS]]
    if len(problems) > MAX_ERRORS:
        lines.append(f"and {len(problems) - MAX_ERRORS} more")
    location = problems[0]["loc"]
    # A rule over several fields has no location; its message begins with the field that it speaks of.
    return InvalidRequest("; ".join(lines), param=str(location[0]) if location else lines[0].partition(":")[0])


def _problem_line(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part)[:MAX_SHOWN] for part in problem["loc"]) or "body"
    if problem["type"] == "extra_forbidden":
        return f"Unknown parameter: `{where}`"
    if problem["type"] == "missing":
        return f"Missing required parameter: `{where}`"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    shown = repr(problem["input"])
    return f"{where}: {problem['msg']}, got {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '…'}"


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Generation(_Body):
    """What completions and chat have in common."""

    model: str = ""
    """Empty: the base."""
    n: int = 1
    best_of: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias_keys_are_token_ids(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value:
            if not _TOKEN_ID.fullmatch(str(key)):
                raise ValueError(f"logit_bias: keys must be token ids, got {str(key)[:MAX_SHOWN]!r}")
        return {str(key): bias for key, bias in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when `stream` is true")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of: only best_of = n is supported, got best_of={self.best_of} and n={self.n}")
        return self

    def _common_params(self) -> dict[str, Any]:
        same = (
            "n min_tokens temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed "
            "include_stop_str_in_output ignore_eos skip_special_tokens"
        )
        return {
            **{name: getattr(self, name) for name in same.split()},
            "logit_bias": {int(key): bias for key, bias in self.logit_bias.items()},
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids),
        }

    @property
    def left_out(self) -> frozenset[str]:
        """Fields of SamplingParams, under the name that they have there, for which the request says nothing."""
        given = {"max_tokens" if name == "max_completion_tokens" else name for name in self.model_fields_set}
        return frozenset(field.name for field in fields(SamplingParams)) - given

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(_Generation):
    NEUTRAL = {**NEUTRAL_IN_BOTH, **NEUTRAL_IN_COMPLETIONS}

    prompt: Any
    """str, list of str, token ids, or list of token-id lists; `prompts()` gives it in one form."""
    max_tokens: int = DEFAULT_COMPLETION_TOKENS
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    @field_validator("prompt")
    @classmethod
    def _one_of_four_forms(cls, value: Any) -> Any:
        if isinstance(value, str) or _is_token_ids(value):
            return value
        if isinstance(value, list) and value and (_all(str, value) or all(_is_token_ids(item) for item in value)):
            if len(value) > MAX_PROMPTS:
                raise ValueError(f"prompt: at most {MAX_PROMPTS} prompts per request, got {len(value)}")
            return value
        raise ValueError("prompt: must be a string, a list of strings, token ids, or a list of token-id lists")

    @model_validator(mode="after")
    def _no_empty_answer(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is only allowed with `echo`")
        return self

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if _all(int, self.prompt):
            return [tuple(self.prompt)]
        return [item if isinstance(item, str) else tuple(item) for item in self.prompt]

    def params(self) -> SamplingParams:
        """For the engine. It cannot generate nothing: for max_tokens 0 the one token is left out of the answer."""
        limit = self.max_tokens if "max_tokens" in self.model_fields_set else max(self.max_tokens, self.min_tokens)
        params = SamplingParams(
            **self._common_params(),
            max_tokens=limit or 1,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )
        params.validate()
        return params


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """What chat templates are written for: content as one string."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class _Template(_Body):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def _template_arguments(self) -> Self:
        if self.continue_final_message and "add_generation_prompt" not in self.model_fields_set:
            self.add_generation_prompt = False
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: cannot be combined with add_generation_prompt")
        if reserved := RESERVED_TEMPLATE_KWARGS & self.chat_template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs: may not set {', '.join(sorted(reserved))}")
        return self

    def chat_prompt(self, messages: list[Message]) -> ChatPrompt:
        return ChatPrompt(
            messages=tuple(message.for_template() for message in messages),
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            template_kwargs=self.chat_template_kwargs,
        )


class ChatRequest(_Generation, _Template):
    NEUTRAL = {**NEUTRAL_IN_BOTH, **NEUTRAL_IN_CHAT}

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when `logprobs` is true")
        return self

    def params(self) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        params = SamplingParams(**self._common_params(), max_tokens=limit, logprobs=logprobs)
        params.validate()
        return params


class TokenizeRequest(_Template):
    """vLLM's: either `prompt` or `messages`."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("prompt: give either `prompt` or `messages`")
        if "add_special_tokens" not in self.model_fields_set:
            self.add_special_tokens = self.prompt is not None
        return self


class DetokenizeRequest(_Body):
    model: str = ""
    tokens: list[int]


def _all(kind: type, values: Any) -> bool:
    return all(type(value) is kind for value in values)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _all(int, value)
