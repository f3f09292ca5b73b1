"""One variant as requests see it: context, vocabulary, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from bitdelta_core.engine.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Variant:
    context_len: int
    vocab_size: int
    vocabulary: Vocabulary
