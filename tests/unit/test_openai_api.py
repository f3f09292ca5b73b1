"""What clients may send: every parameter is obeyed or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from bitdelta_core.errors import InvalidRequest
from deployments.openai_api import (
    MAX_SHOWN,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_body,
)
from deployments.openai_fields import NEUTRAL_IN_BOTH, NEUTRAL_IN_CHAT, NEUTRAL_IN_COMPLETIONS

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"prompt": "hi"}


def complete(**fields: Any) -> CompletionRequest:
    return parse_body(CompletionRequest, TEXT | fields)


def chat(**fields: Any) -> ChatRequest:
    return parse_body(ChatRequest, CHAT | fields)


def refusal(kind: type, body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(kind, body).params()
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ("", [""]),
    ],
    ids=["text", "texts", "ids", "lists of ids", "empty"],
)
def test_the_four_forms_of_a_prompt(prompt: Any, expected: list) -> None:
    assert complete(prompt=prompt).prompts() == expected


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1, "a"], [[1], "a"], [True], 7, {"a": 1}, [[1.5]], None])
def test_other_forms_are_refused(prompt: Any) -> None:
    assert refusal(CompletionRequest, {"prompt": prompt}).param == "prompt"


def test_every_sampling_parameter_reaches_the_engine() -> None:
    given = {
        "n": 3,
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
        "seed": 2**63 + 5,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    params = complete(**given, logit_bias={"5": -3}, stop="x", stop_token_ids=[9], logprobs=2, echo=True).params()
    assert {name: getattr(params, name) for name in given} == given
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({5: -3.0}, ("x",), (9,))
    assert (params.logprobs, params.prompt_logprobs) == (2, 2)


def test_defaults_are_those_of_the_api() -> None:
    assert complete().params().max_tokens == 16
    assert chat().params().max_tokens is None
    assert complete().params().logprobs is None
    assert complete(logprobs=1).params().prompt_logprobs is None
    assert chat(logprobs=True).params().logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).params().logprobs == 3
    assert chat(max_tokens=3, max_completion_tokens=5).params().max_tokens == 5
    assert chat().add_special_tokens is False
    assert complete().add_special_tokens is True


def test_what_a_request_leaves_out_is_known() -> None:
    """A variant's generation config may fill it in. Null says nothing; a value equal to the default says something."""
    left = complete(temperature=1.0, top_p=None, max_tokens=16).left_out
    assert "top_p" in left
    assert not left & {"temperature", "max_tokens"}
    assert "max_tokens" in chat().left_out
    assert "max_tokens" not in chat(max_completion_tokens=3).left_out
    assert complete(min_tokens=20).params().max_tokens == 20


def test_null_is_the_same_as_absent() -> None:
    assert complete(temperature=None, stop=None, suffix=None, logit_bias=None, user=None) == complete()


@pytest.mark.parametrize("name", sorted({**NEUTRAL_IN_BOTH, **NEUTRAL_IN_CHAT}))
def test_unsupported_chat_parameters_are_refused_by_name(name: str) -> None:
    error = refusal(ChatRequest, CHAT | {name: "surely not the neutral value"})
    assert (error.param, error.status) == (name, 400)
    assert f"`{name}`" in str(error)


@pytest.mark.parametrize("name", sorted({**NEUTRAL_IN_BOTH, **NEUTRAL_IN_COMPLETIONS}))
def test_values_that_ask_for_nothing_pass(name: str) -> None:
    for neutral in {**NEUTRAL_IN_BOTH, **NEUTRAL_IN_COMPLETIONS}[name]:
        assert complete(**{name: neutral}) == complete()


def test_a_neutral_value_must_have_the_right_type() -> None:
    assert refusal(ChatRequest, CHAT | {"store": 0}).param == "store"


def test_unknown_parameters_are_refused_by_name() -> None:
    error = refusal(CompletionRequest, TEXT | {"temprature": 1})
    assert error.param == "temprature"
    assert "Unknown parameter: `temprature`" in str(error)


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, TEXT | {"stream_options": {"include_usage": True}}, "stream_options"),
        (CompletionRequest, TEXT | {"best_of": 2}, "best_of"),
        (CompletionRequest, TEXT | {"max_tokens": 0}, "max_tokens"),
        (CompletionRequest, TEXT | {"max_tokens": "5"}, "max_tokens"),
        (CompletionRequest, TEXT | {"max_tokens": -1}, "max_tokens"),
        (CompletionRequest, TEXT | {"n": True}, "n"),
        (CompletionRequest, TEXT | {"n": 0}, "n"),
        (CompletionRequest, TEXT | {"temperature": 2.5}, "temperature"),
        (CompletionRequest, TEXT | {"top_p": 0}, "top_p"),
        (CompletionRequest, TEXT | {"logit_bias": {"a": 1}}, "logit_bias"),
        (CompletionRequest, TEXT | {"logit_bias": {"1": 101}}, "logit_bias"),
        (CompletionRequest, TEXT | {"logit_bias": {"²": 1}}, "logit_bias"),
        (CompletionRequest, TEXT | {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (CompletionRequest, TEXT | {"logit_bias": {"1": "x"}}, "logit_bias"),
        (CompletionRequest, TEXT | {"logit_bias": [1]}, "logit_bias"),
        (CompletionRequest, TEXT | {"stop": [""]}, "stop"),
        (CompletionRequest, TEXT | {"logprobs": 1000}, "logprobs"),
        (CompletionRequest, {}, "prompt"),
        (ChatRequest, {}, "messages"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (ChatRequest, CHAT | {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        (ChatRequest, CHAT | {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (ChatRequest, {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (TokenizeRequest, {}, "prompt"),
        (TokenizeRequest, {"prompt": "a", **CHAT}, "prompt"),
        (DetokenizeRequest, {"tokens": "a"}, "tokens"),
        (CompletionRequest, [1], None),
    ],
)
def test_refusals_name_the_parameter(kind: type, body: Any, param: str | None) -> None:
    error = refusal(kind, body)
    assert (error.param, error.status) == (param, 400)


def test_at_most_ten_problems_and_short_inputs() -> None:
    error = refusal(CompletionRequest, TEXT | {f"x{i}": i for i in range(15)} | {"n": "y" * 10_000})
    assert "and 6 more" in str(error)
    assert len(str(error)) < 11 * (MAX_SHOWN + 100)


def test_continue_final_message_turns_the_generation_prompt_off() -> None:
    prompt = chat(continue_final_message=True).chat_prompt([])
    assert (prompt.continue_final_message, prompt.add_generation_prompt) == (True, False)


def test_content_parts_become_one_text() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    request = parse_body(ChatRequest, body)
    assert request.chat_prompt(request.messages).messages == ({"role": "user", "content": "a\nb"},)
