"""The official SDK against the real server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.integration.serve_harness import ACME_KEY, VARIANTS, Server, texts

pytestmark = pytest.mark.ray
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def test_every_variant_answers_as_its_restored_checkpoint_all_at_once(server: Server) -> None:
    """The test that would catch one variant served with another's weights."""
    models, prompts = [None, *VARIANTS], ["Hello", "2 + 2 =", "x" * 40]
    asked = [(model, prompt) for prompt in prompts for model in models] * 2
    client = server.client()

    def ask(question: tuple[str | None, str]) -> str:
        model, prompt = question
        return client.completions.create(model=model or "base", prompt=prompt, **GREEDY).choices[0].text

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    expected = [server.models.answer(server.deltas[model] if model else None, prompt, 12) for model, prompt in asked]
    assert answers == expected
    assert len(set(answers[: len(models)])) == len(models), "the variants differ, or this test proves nothing"


def test_chat_is_the_variant_s_own_template(server: Server) -> None:
    answer = server.client().chat.completions.create(
        model="acme/chat", messages=[{"role": "user", "content": "hi"}], temperature=0, max_completion_tokens=8
    )
    expected = server.models.answer(server.deltas["acme/chat"], "<|user|>hi\n<|assistant|>", 8)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (expected, "assistant")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5


def test_streams_are_the_same_in_pieces(server: Server) -> None:
    client = server.client()
    whole = client.completions.create(model="acme/plain", prompt="Hello", **GREEDY)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model="acme/plain", prompt="Hello", **GREEDY, **options))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    messages: Any = [{"role": "user", "content": "hi"}]
    one = client.chat.completions.create(model="acme/chat", messages=messages, temperature=0, max_tokens=8)
    deltas = list(
        client.chat.completions.create(model="acme/chat", messages=messages, temperature=0, max_tokens=8, **options)
    )
    assert "".join(c.choices[0].delta.content or "" for c in deltas if c.choices) == one.choices[0].message.content
    assert deltas[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in deltas if c.choices][-1] == one.choices[0].finish_reason


def test_the_base_when_no_model_is_named(server: Server) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "Hello", **GREEDY}).json()
    assert answer["model"] == "base"
    assert answer["choices"][0]["text"] == server.models.answer(None, "Hello", 12)


def test_prompt_forms_and_choices(server: Server) -> None:
    client = server.client()
    with server.http() as http:
        ids = http.post("/tokenize", json={"model": "acme/plain", "prompt": "Hello"}).json()["tokens"]
        text = http.post("/detokenize", json={"model": "acme/plain", "tokens": ids}).json()["prompt"]
    assert text == "Hello"
    one = texts(client.completions.create(model="acme/plain", prompt="Hello", **GREEDY))
    assert texts(client.completions.create(model="acme/plain", prompt=ids, **GREEDY)) == one
    assert texts(client.completions.create(model="acme/plain", prompt=[ids, ids], **GREEDY)) == one * 2
    two = client.completions.create(model="acme/plain", prompt=["Hello", "Bye"], n=2, **GREEDY)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    assert texts(two)[:2] == one * 2
    assert texts(two)[2] == texts(two)[3]
    assert two.usage is not None
    assert two.usage.prompt_tokens == 8


def test_a_request_that_fans_out_to_many_calls_completes(server: Server) -> None:
    """Concurrent calls inside one Serve request share an id, over which a plain RequestRouter loses some for ever."""
    answer = server.client().completions.create(model="acme/plain", prompt=["Hello"] * 40, temperature=0, max_tokens=3)
    assert len(answer.choices) == 40
    assert len(set(texts(answer))) == 1


def test_more_choices_than_an_engine_takes_on_at_once(server: Server) -> None:
    answer = server.client().completions.create(model="acme/plain", prompt=["Hello"] * 64, n=20, max_tokens=1)
    assert [choice.index for choice in answer.choices] == list(range(64 * 20))


def test_prompts_of_megabytes_are_too_long_and_nothing_worse(server: Server) -> None:
    """More than gRPC lets pass by itself."""
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        server.client().completions.create(model="acme/plain", prompt="a" * 5_000_000, max_tokens=1)


def test_echo_with_logprobs_as_lm_eval_asks(server: Server) -> None:
    client = server.client()
    options: Any = {"model": "acme/plain", "prompt": "Hello", "echo": True, "logprobs": 1, "temperature": 0, "seed": 1}
    for count in (0, 1):
        choice = client.completions.create(max_tokens=count, **options).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        assert "".join(choice.logprobs.tokens[:5]) == "Hello"
        assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs) == 5 + count
        assert choice.logprobs.token_logprobs[0] is None
        assert all(p < 0 for p in choice.logprobs.token_logprobs[1:])
        assert choice.text.startswith("Hello")
        assert (len(choice.text) > 5) == bool(count)


def test_seeds_stop_and_bias_are_obeyed(server: Server) -> None:
    client = server.client()
    warm: Any = {"model": "acme/plain", "prompt": "Hello", "max_tokens": 20, "temperature": 1.5}
    assert texts(client.completions.create(seed=5, **warm)) == texts(client.completions.create(seed=5, **warm))
    assert texts(client.completions.create(seed=5, **warm)) != texts(client.completions.create(seed=6, **warm))
    only: Any = {"model": "acme/plain", "prompt": "Hello", "temperature": 0, "max_tokens": 5, "logit_bias": {"65": 100}}
    letter = texts(client.completions.create(**only))[0]
    assert letter == letter[0] * 5
    stopped = client.completions.create(**only, stop=letter[:2]).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    assert stopped.model_extra == {"stop_reason": letter[:2]}


def test_models(server: Server) -> None:
    cards = {card.id: card for card in server.client().models.list()}
    assert {"base", *VARIANTS} <= set(cards)
    assert cards["base"].model_extra is not None
    assert cards["base"].model_extra["parent"] is None
    assert cards["acme/plain"].model_extra is not None
    assert cards["acme/plain"].model_extra["parent"] == "base"
    assert cards["acme/plain"].owned_by == "acme"
    assert server.client().models.retrieve("acme/plain@1").id == "acme/plain@1"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("acme/nothing")


@pytest.mark.parametrize(
    ("body", "error", "code", "param"),
    [
        ({"model": "acme/nothing"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"prompt": ""}, openai.BadRequestError, "invalid_request", "prompt"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"suffix": "x"}, openai.BadRequestError, "invalid_request", "suffix"),
        ({"extra_body": {"wrong": 1}}, openai.BadRequestError, "invalid_request", "wrong"),
        ({"max_tokens": 9000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"prompt": [999_999]}, openai.BadRequestError, "invalid_request", "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_a_status_a_code_and_a_param(
    server: Server, body: dict[str, Any], error: type, code: str, param: str, stream: bool
) -> None:
    asked: Any = {"model": "acme/plain", "prompt": "Hello", "stream": stream} | body
    with pytest.raises(error) as caught:
        server.client().completions.create(**asked)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_prompt_of_several_fails_the_request(server: Server, stream: bool) -> None:
    """When streamed, perhaps after another prompt's first token: then as an event, which the SDK raises."""
    with pytest.raises(openai.APIError, match="prompt is empty"):
        list(server.client().completions.create(model="acme/plain", prompt=["Hello", "", "Bye"], stream=stream))


def test_a_variant_without_a_template_says_so(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        server.client().chat.completions.create(model="acme/plain", messages=[{"role": "user", "content": "hi"}])


def test_keys(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    acme = server.client(ACME_KEY)
    assert all(card.id == "base" or card.id.startswith("acme/") for card in acme.models.list())
    assert texts(acme.completions.create(model="acme/plain", prompt="a", max_tokens=1))
    refusals = []
    for name in ("zeta/dense", "zeta/never-was"):
        with pytest.raises(openai.NotFoundError) as refused:
            acme.completions.create(model=name, prompt="a")
        refusals.append(str(refused.value.body).replace(name, "NAME"))
    assert refusals[0] == refusals[1]
    with server.http(None) as http:
        assert http.get("/health").status_code == http.get("/ping").status_code == 200
        assert http.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert http.post("/tokenize", json={"prompt": "a"}).status_code == 401


def test_requests_that_no_sdk_would_send(server: Server) -> None:
    with server.http() as http:
        for method, path, content, status in [
            ("POST", "/v1/completions", b"", 400),
            ("POST", "/v1/completions", b"[1]", 400),
            ("POST", "/v1/chat/completions", b'{"messages": 5}', 400),
            ("TRACE", "/v1/completions", b"", 405),
            ("GET", "/v1/nothing", b"", 404),
            ("GET", "/docs", b"", 404),
        ]:
            answer = http.request(method, path, content=content)
            assert answer.status_code == status, (method, path)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_request_ids_and_version(server: Server) -> None:
    with server.http() as http:
        answer = http.get("/version", headers={"X-Request-Id": "mine-1"})
        assert answer.headers.get_list("x-request-id") == ["mine-1"]
        assert answer.json()["version"]
        assert http.get("/version").headers["x-request-id"] != "mine-1"


def test_load_balancers_may_ask_without_wanting_a_body(server: Server) -> None:
    with server.http() as http:
        assert [http.head(path).status_code for path in ("/health", "/ping")] == [200, 200]


def test_stream_frames_on_the_wire(server: Server) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "Hello", "stream": True, **GREEDY})
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(frame.removeprefix("data: "))["object"] == "text_completion" for frame in frames[:-2])
