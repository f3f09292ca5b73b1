"""The small files of a fine-tune that travel with its delta: tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def sidecars(base: Path, fine: Path) -> dict[str, bytes]:
    """What a delta must carry, by file name.

    The tokenizer's files go together: all of the fine-tune's when any differs from the base's, none when all are equal
    or when the fine-tune has none. generation_config.json goes when it differs.
    """
    theirs = _read(fine, TOKENIZER_FILES)
    found = theirs if theirs and theirs != _read(base, TOKENIZER_FILES) else {}
    generation = _read(fine, (GENERATION_CONFIG,))
    return found | (generation if generation != _read(base, (GENERATION_CONFIG,)) else {})


def _read(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
