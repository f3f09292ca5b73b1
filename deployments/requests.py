"""From a parsed request to the calls that answer it."""

from __future__ import annotations

from deployments.calls import GenerateCall, Target
from deployments.openai_api import ChatRequest, CompletionRequest


def completion_calls(body: CompletionRequest, request_id: str, target: Target, tenant: str) -> list[GenerateCall]:
    """One call per prompt, in order."""
    params = body.params()
    return [
        GenerateCall(
            request_id=f"{request_id}-{number}",
            target=target,
            prompt=prompt,
            params=params,
            left_out=body.left_out,
            add_special_tokens=body.add_special_tokens,
            echo=body.echo,
            stream=body.stream,
            tenant=tenant,
        )
        for number, prompt in enumerate(body.prompts())
    ]


def chat_call(body: ChatRequest, request_id: str, target: Target, tenant: str) -> GenerateCall:
    return GenerateCall(
        request_id=request_id,
        target=target,
        prompt=body.chat_prompt(body.messages),
        params=body.params(),
        left_out=body.left_out,
        add_special_tokens=body.add_special_tokens,
        stream=body.stream,
        tenant=tenant,
    )
