"""What clients get, from scripted items; read back with the official SDK's own types."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from openai.types import Completion as SdkCompletion
from openai.types.chat import ChatCompletion as SdkChat
from openai.types.chat import ChatCompletionChunk as SdkChunk

from bitdelta_core.engine.api import PositionLogprobs, TokenEvent, TokenLogprob
from deployments.calls import Accepted
from deployments.chat import chat_chunks, chat_completion
from deployments.completions import completion, completion_chunks
from deployments.errors import ReplicaLost
from deployments.openai_api import ChatRequest, CompletionRequest, parse_body

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


class Script:
    """Items as a gateway would give them; remembers whether it was closed."""

    def __init__(self, *items: Any) -> None:
        self.items, self.closed = items, False

    async def __call__(self) -> AsyncGenerator[tuple[int, Any]]:
        try:
            for item in self.items:
                yield item if isinstance(item, tuple) else (0, item)
        finally:
            self.closed = True


def token(token_id: int, text: str, logprob: float = -0.5) -> PositionLogprobs:
    best = TokenLogprob(token_id=token_id, text=text, logprob=logprob, rank=2)
    other = TokenLogprob(token_id=99, text="é", logprob=-0.1, rank=1)
    return PositionLogprobs(chosen=best, top=(other, best))


def event(text: str, at: int, index: int = 0, **fields: Any) -> TokenEvent:
    return TokenEvent(
        request_id="r", index=index, token_ids=(at,), text=text, prompt_tokens=3, completion_tokens=at, **fields
    )


def two_tokens() -> Script:
    return Script(
        Accepted(prompt_tokens=3),
        event("a", 1, logprobs=(token(1, "a"),)),
        event("b", 2, logprobs=(token(2, "b"),), finish_reason="stop", stop_reason="c", cached_tokens=2),
    )


async def test_completion_as_the_sdk_reads_it() -> None:
    body = parse_body(CompletionRequest, {"prompt": "hi", "logprobs": 1})
    answer = await completion(body, "cmpl-1", "acme/x", two_tokens()())
    read = SdkCompletion.model_validate_json(answer.to_json(), strict=True)
    choice = read.choices[0]
    assert (read.id, read.object, read.model) == ("cmpl-1", "text_completion", "acme/x")
    assert (choice.text, choice.finish_reason, choice.index) == ("ab", "stop", 0)
    assert choice.model_extra == {"stop_reason": "c"}
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b"]
    assert choice.logprobs.text_offset == [0, 1]
    assert choice.logprobs.top_logprobs == [{"a": -0.5, "é": -0.1}, {"b": -0.5, "é": -0.1}]
    assert read.usage is not None
    assert (read.usage.prompt_tokens, read.usage.completion_tokens, read.usage.total_tokens) == (3, 2, 5)
    assert read.usage.prompt_tokens_details is not None
    assert read.usage.prompt_tokens_details.cached_tokens == 2


async def test_chunks_joined_are_the_whole_answer() -> None:
    whole = await completion(parse_body(CompletionRequest, {"prompt": "x"}), "c", "m", two_tokens()())
    body = parse_body(CompletionRequest, {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}})
    chunks = [c async for c in completion_chunks(body, "c", "m", two_tokens()())]
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, "stop"]
    assert [c.usage for c in chunks] == [None, None, whole.usage]
    assert chunks[-1].choices == []
    assert '"usage"' not in chunks[0].to_json()


async def test_usage_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = parse_body(CompletionRequest, {"prompt": "x", "stream": True, "stream_options": options})
    counted = [c.usage.completion_tokens async for c in completion_chunks(body, "c", "m", two_tokens()()) if c.usage]
    assert counted == [1, 2, 2]


async def test_echo_with_logprobs_and_nothing_generated() -> None:
    """What lm-eval asks for, with max_tokens 0 instead of 1."""
    body = parse_body(CompletionRequest, {"prompt": "hi!", "echo": True, "logprobs": 1, "max_tokens": 0})
    prompt = (None, token(5, "i", -1.5), token(6, "!", -2.5))
    script = Script(
        Accepted(prompt_tokens=3, prompt_text="hi!", first_token_text="h"),
        TokenEvent(request_id="r", prompt_logprobs=prompt, prompt_tokens=3),
        event("never", 1, finish_reason="length", logprobs=(token(1, "never"),)),
    )
    answer = await completion(body, "c", "m", script())
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("hi!", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["h", "i", "!"]
    assert choice.logprobs.token_logprobs == [None, -1.5, -2.5]
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_comes_first_and_once_per_choice(stream: bool) -> None:
    body = parse_body(CompletionRequest, {"prompt": "hi", "echo": True, "n": 2, "stream": stream})
    script = Script(
        Accepted(prompt_tokens=2, prompt_text="hi"),
        event("a", 1),
        event("b", 1, index=1),
        event("c", 2, finish_reason="length"),
        event("d", 2, index=1, finish_reason="length"),
    )
    if stream:
        texts = {0: "", 1: ""}
        async for chunk in completion_chunks(body, "c", "m", script()):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        texts = {c.index: c.text for c in (await completion(body, "c", "m", script())).choices}
    assert texts == {0: "hiac", 1: "hibd"}


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    body = parse_body(CompletionRequest, {"prompt": ["x", "y"], "n": 2})
    done = {"finish_reason": "length"}
    script = Script(
        (1, Accepted(prompt_tokens=5)),
        (0, Accepted(prompt_tokens=3)),
        *((p, event(f"{p}{i}", 1, index=i, **done)) for p, i in [(1, 1), (0, 0), (1, 0), (0, 1)]),
    )
    answer = await completion(body, "c", "m", script())
    assert [(c.index, c.text) for c in answer.choices] == [(0, "00"), (1, "01"), (2, "10"), (3, "11")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 4)


async def test_chat_as_the_sdk_reads_it() -> None:
    body = parse_body(ChatRequest, CHAT | {"logprobs": True, "top_logprobs": 1})
    answer = await chat_completion(body, "chatcmpl-1", "m", two_tokens()())
    read = SdkChat.model_validate_json(answer.to_json())
    choice = read.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "ab", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [(t.token, t.bytes) for t in choice.logprobs.content] == [("a", [97]), ("b", [98])]
    assert [(t.token, t.logprob) for t in choice.logprobs.content[0].top_logprobs] == [("é", -0.1), ("a", -0.5)]
    assert read.usage is not None
    assert read.usage.total_tokens == 5


async def test_chat_chunks_begin_with_the_role_and_end_with_the_reason() -> None:
    body = parse_body(ChatRequest, CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    frames = [c.to_json() async for c in chat_chunks(body, "c", "m", two_tokens()())]
    chunks = [SdkChunk.model_validate_json(frame) for frame in frames]
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == ["a", "b"]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, "stop"]
    assert '"finish_reason":null' in frames[0]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


async def test_no_chunk_for_a_token_without_text() -> None:
    body = parse_body(ChatRequest, CHAT | {"stream": True})
    script = Script(Accepted(prompt_tokens=1), event("", 1), event("é", 2, finish_reason="stop"))
    assert len([c async for c in chat_chunks(body, "c", "m", script())]) == 2


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_an_unfinished_choice_is_an_error_not_a_finish_reason(reason: Any) -> None:
    script = Script(Accepted(prompt_tokens=1), event("a", 1, finish_reason=reason))
    with pytest.raises(ReplicaLost):
        await chat_completion(parse_body(ChatRequest, CHAT), "c", "m", script())
    assert script.closed


async def test_leaving_the_chunks_closes_the_items() -> None:
    script = two_tokens()
    chunks = chat_chunks(parse_body(ChatRequest, CHAT | {"stream": True}), "c", "m", script())
    await anext(chunks)
    await chunks.aclose()
    assert script.closed
