"""Chat templates are a variant's own files: what they do wrong is the request's answer, not the replica's end."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bitdelta_core.errors import InvalidRequest
from deployments.calls import ChatPrompt
from deployments.prompts import render
from tests.tiny import make_tokenizer

TEMPLATES = {
    "a zero": "{{ 1 // (messages | length - 1) }}",
    "a range": "{{ range(10**9) | list }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a key": "{{ messages[0]['nothing']['more'] }}",
    "an item": "{{ messages[7].content }}",
    "its own words": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_fails_refuses_the_messages(template: str, tmp_path: Any) -> None:
    make_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = template
    prompt = ChatPrompt(messages=({"role": "user", "content": "hi"},))
    with pytest.raises(InvalidRequest, match="chat template refuses the messages"):
        render(tokenizer, prompt)
