"""What a model directory says beside the weights: tokenizer, stop tokens, defaults for sampling. Read once and kept."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bitdelta_core.delta.config import CONFIG_FILE
from bitdelta_core.delta.sidecars import GENERATION_CONFIG, TOKENIZER_FILES
from bitdelta_core.engine.api import SamplingParams
from bitdelta_core.engine.detokenizer import Decode, decoder_of
from bitdelta_core.errors import CheckpointError, DeltaFormatError

MAX_KEPT = 1024
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Vocabulary:
    """How one variant reads and writes text."""

    tokenizer: Any
    """A Hugging Face tokenizer, with the variant's chat template if it has one."""
    stop_ids: frozenset[int]
    """End-of-sequence ids: of the generation config (or else the config), and of the tokenizer."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json: the variant's, or else the base's."""
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    """What the variant changes in config.json."""

    @cached_property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of SamplingParams that the generation config sets; as in vLLM, `do_sample` is not looked at.

        Raises:
            InvalidRequest: one of them is out of range.
        """
        wanted = {name: name for name in _SAMPLING} | {"max_tokens": "max_new_tokens"}
        said = {ours: self.generation_config.get(theirs) for ours, theirs in wanted.items()}
        defaults = {name: value for name, value in said.items() if value is not None}
        SamplingParams(**defaults).validate()
        return defaults

    @cached_property
    def decode(self) -> Decode:
        return decoder_of(self.tokenizer, skip_special_tokens=True)

    @cached_property
    def decode_all(self) -> Decode:
        """Special tokens included."""
        return decoder_of(self.tokenizer, skip_special_tokens=False)


class Vocabularies:
    """`get` blocks while files are fetched and read: call it from threads, never from the loop."""

    def __init__(self, base: Path, held: Callable[[str], AbstractContextManager[Path]]) -> None:
        self._base = base
        self._held = held
        self._lock = threading.Lock()
        self._kept: OrderedDict[str | None, Vocabulary] = OrderedDict()

    def get(self, delta: str | None) -> Vocabulary:
        """The variant's vocabulary; None: the base's. The content of a sha256 never changes, so it is read once.

        Raises:
            DeltaFormatError, CheckpointError: its tokenizer cannot be read.
            BitDeltaError: its files cannot be had.
        """
        with self._lock:
            if delta in self._kept:
                self._kept.move_to_end(delta)
                return self._kept[delta]
        with nullcontext() if delta is None else self._held(delta) as path:
            vocabulary = read_vocabulary(self._base, path, delta, inherited=self._inherited(path))
        with self._lock:
            self._kept[delta] = vocabulary
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return vocabulary

    def _inherited(self, variant: Path | None) -> Any | None:
        """The base's tokenizer, for a variant without one of its own. Reading it anew for each would hold the
        interpreter, and so all running sequences, for a tenth of a second."""
        return None if variant is None or _has_tokenizer(variant) else self.get(None).tokenizer


def read_vocabulary(
    base: Path, variant: Path | None, delta: str | None = None, *, inherited: Any | None = None
) -> Vocabulary:
    """Read from a variant's directory; what it does not carry is the base's.

    Args:
        inherited: the base's tokenizer, if it has been read already.
    """
    from transformers import AutoTokenizer

    own = _has_tokenizer(variant)
    path = variant if own else base
    try:
        tokenizer = None if own else inherited
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        generation = [_read(place / GENERATION_CONFIG) for place in (variant, base) if place is not None]
        overrides = {} if variant is None else _read(variant / CONFIG_FILE).get("config_overrides", {})
        stops = _stop_ids(generation[0], overrides, generation[-1], _read(base / "config.json"))
    except Exception as error:  # transformers raises whatever its parsers do
        if own:
            raise DeltaFormatError(
                f"its tokenizer cannot be read: {type(error).__name__}: {error}", delta=delta
            ) from error
        raise CheckpointError(f"the tokenizer in {base} cannot be read: {type(error).__name__}: {error}") from error
    if tokenizer.eos_token_id is not None:
        stops = stops | {tokenizer.eos_token_id}
    return Vocabulary(tokenizer, stops, generation[0] or generation[-1], overrides)


def _has_tokenizer(variant: Path | None) -> bool:
    return variant is not None and any((variant / name).is_file() for name in TOKENIZER_FILES)


def _stop_ids(*said: Mapping[str, Any]) -> frozenset[int]:
    """The first that says anything: generation config, then config, the variant's before the base's."""
    found = next((body["eos_token_id"] for body in said if body.get("eos_token_id") is not None), [])
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"eos_token_id must be token ids, got {found!r}")
    return frozenset(ids)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
