"""Parameters of the OpenAI API and of vLLM that are known here but not obeyed: each is refused by its name.

A value that asks for nothing (`tools: []`, `response_format: {"type": "text"}`, null) is what we do anyway and passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitdelta_core.errors import InvalidRequest

_NOTHING: tuple[Any, ...] = ([], {}, False, "")
NEUTRAL_IN_CHAT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
}
NEUTRAL_IN_COMPLETIONS: Mapping[str, tuple[Any, ...]] = {"response_format": ({"type": "text"},), "suffix": ("",)}
NEUTRAL_IN_BOTH: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "lora_request": (),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}


def take_supported(body: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The body without nulls and without parameters that ask for nothing.

    Raises:
        InvalidRequest: for the first one that is known, not neutral, and not supported.
    """
    kept = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in neutral:
            kept[name] = value
        elif not any(value == harmless and type(value) is type(harmless) for harmless in neutral[name]):
            allowed = ", ".join(repr(v) for v in neutral[name] if v not in _NOTHING)
            hint = f" (only {allowed})" if allowed else ""
            raise InvalidRequest(f"The parameter `{name}` is not supported{hint}.", param=name)
    return kept
