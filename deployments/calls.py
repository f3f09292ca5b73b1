"""What travels between the ingress (or a Python client) and a model replica. Plain data; no torch, no Ray.

A replica answers a GenerateCall with batches of items: first one `Accepted`, then TokenEvents; or, at any place and
then last, the error itself as a value. An exception raised through Ray would arrive wrapped and without its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitdelta_core.engine.api import SamplingParams, TokenEvent
from bitdelta_core.errors import BitDeltaError
from storage.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What one replica serves."""

    base_name: str
    base_sha256: str
    max_model_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Whose weights a request is for, after the name was resolved. No manifest: the bare base."""

    model: str
    """As the answer's `model` field says it."""
    manifest: Manifest | None = None

    @property
    def delta(self) -> str | None:
        """sha256 of the delta; also what the request router goes by."""
        return self.manifest.delta_sha256 if self.manifest else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """Messages, for the variant's own template."""

    messages: tuple[Mapping[str, str], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """One prompt for one target."""

    request_id: str
    target: Target
    prompt: str | tuple[int, ...] | ChatPrompt
    params: SamplingParams
    left_out: frozenset[str] = frozenset()
    """Fields of `params` that the request does not set: the variant's generation config may."""
    add_special_tokens: bool = True
    echo: bool = False
    """Whether Accepted shall say what the prompt's text is."""
    stream: bool = False
    """False: the answer may come in one piece."""
    tenant: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeCall:
    target: Target
    prompt: str | ChatPrompt
    add_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DetokenizeCall:
    target: Target
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The prompt was tokenised and handed to the engine."""

    prompt_tokens: int
    prompt_text: str = ""
    """With `echo`."""
    first_token_text: str = ""
    """With `echo`: that of the one prompt token that has no logprob, and hence no other place to be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The answer to a TokenizeCall."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    max_model_len: int


Item = Accepted | TokenEvent | BitDeltaError
