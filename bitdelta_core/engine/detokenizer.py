"""From token ids to text, while they come.

A token's text depends on its neighbours: a character may be spread over several tokens, and some tokenizers drop the
space before the first word. So each step decodes a short window twice, without and with the new tokens, and what the
second has more than the first is the new text; while it ends in half a character, nothing is given out.

Text that a stop string might begin with is held back until that is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitdelta_core.errors import CheckpointError

HALF = "\ufffd"
"""What half a character decodes to."""
CONTEXT_TOKENS = 6
"""How many prompt tokens the first window begins with."""
MAX_PENDING = 12
"""Tokens after which a trailing replacement character is no half character any more (UTF-8 has at most 4 bytes)."""

Decode = Callable[[Sequence[int]], str]


def decoder_of(tokenizer: Any, *, skip_special_tokens: bool) -> Decode:
    """The fastest way to decode ids with a Hugging Face tokenizer. It raises CheckpointError where that fails."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _refusing(lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens))
    return _refusing(
        lambda ids: tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


def _refusing(decode: Decode) -> Decode:
    """A tokenizer is one variant's file: what it does wrong, panics of its Rust included, is not the engine's end."""

    def checked(ids: Sequence[int]) -> str:
        try:
            return decode(ids)
        except BaseException as error:
            raise CheckpointError(f"its tokenizer cannot decode: {type(error).__name__}: {error}") from None

    return checked


class Detokenizer:
    """The text of one growing sequence."""

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._read = len(self._window)
        self._known = decode(self._window).removesuffix(HALF)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(HALF) and len(self._window) - self._read < MAX_PENDING:
            return ""
        return self._accept(text)

    def flush(self) -> str:
        """The sequence is over: what is still held, replacement characters included."""
        return self._accept(self._decode(self._window)) if len(self._window) > self._read else ""

    def _accept(self, text: str) -> str:
        new = text[len(self._known) :]
        known = self._decode(self._window[self._read :])
        if known:  # a window without text, of skipped special tokens, would be no context for the next word's space
            self._window = self._window[self._read :]
        self._known = known or text
        self._read = len(self._window)
        return new


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be given out, the stop string that ended it). After a stop there is nothing more."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = min(((at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            at, _, stop = found
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The sequence is over without a stop string: what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
