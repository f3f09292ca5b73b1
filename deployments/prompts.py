"""From what a caller sends to token ids, with the variant's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from bitdelta_core.errors import InvalidRequest
from deployments.calls import ChatPrompt


def token_ids(tokenizer: Any, prompt: str | tuple[int, ...] | ChatPrompt, add_special_tokens: bool) -> tuple[int, ...]:
    """The prompt's tokens. `add_special_tokens`: whether the tokenizer adds its own, as BOS, to a text.

    Raises:
        InvalidRequest: an empty prompt, no chat template, or messages that the template refuses.
    """
    if isinstance(prompt, ChatPrompt):
        prompt = render(tokenizer, prompt)
    ids = tuple(tokenizer.encode(prompt, add_special_tokens=add_special_tokens)) if isinstance(prompt, str) else prompt
    if not ids:
        raise InvalidRequest("The prompt is empty: it has no tokens.", param="prompt")
    return ids


def render(tokenizer: Any, prompt: ChatPrompt) -> str:
    """The messages as the variant's template writes them. Templates run in transformers' sandbox."""
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "This model has no chat template, so it cannot be asked with messages; use /v1/completions.", param="model"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages],
            tokenize=False,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            **prompt.template_kwargs,
        )
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise InvalidRequest(f"The model's chat template refuses the messages: {error}", param="messages") from error


def check_ids(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raise InvalidRequest for ids that the tokenizer does not have."""
    if bad := next((i for i in ids if not 0 <= i < len(tokenizer)), None):
        raise InvalidRequest(f"Token id {bad} is outside 0..{len(tokenizer) - 1}.", param="tokens")
