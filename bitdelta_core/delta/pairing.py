"""A base and a fine-tune of it, seen as one list of parameter pairs; tied heads are settled here.

A delta may untie a head that the base ties, never tie one that the base keeps apart: a fine-tune that does is stored
as an untied one whose head happens to equal its embedding (docs/delta-format.md, "Tied heads").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.config import DTYPES, config_overrides
from bitdelta_core.delta.format import EMBEDDING, HEAD
from bitdelta_core.errors import CheckpointError

_IGNORED_KEYS = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Of config.json: they say nothing of what the model computes."""
_ARCHITECTURE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_BUFFERS = ("rotary_emb.inv_freq",)
"""Suffixes of tensors that old checkpoints carry although they follow from config.json."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """Parameters of `fine` beside those of `base`."""

    base: Checkpoint
    fine: Checkpoint

    @property
    def names(self) -> list[str]:
        """The parameters that an entry may name, sorted. The head is one unless both sides tie it."""
        names = [name for name in parameters(self.base) if name != HEAD]
        if not (is_tied(self.base) and is_tied(self.fine)):
            names.append(HEAD)
        return sorted(names)

    def base_tensor(self, name: str) -> torch.Tensor:
        return self.base.get(EMBEDDING if name == HEAD and is_tied(self.base) else name)

    def fine_tensor(self, name: str) -> torch.Tensor:
        return self.fine.get(EMBEDDING if name == HEAD and is_tied(self.fine) else name)

    def release(self) -> None:
        """Let go of the mapped files; see `Checkpoint.release`."""
        self.base.release()
        self.fine.release()

    def overrides(self) -> dict[str, Any]:
        """Config overrides of the variant."""
        overrides = config_overrides(self.base.config, self.fine.config, ignore=_IGNORED_KEYS)
        tied = is_tied(self.base) and is_tied(self.fine)
        overrides.pop("tie_word_embeddings", None)
        if tied != is_tied(self.base):
            overrides["tie_word_embeddings"] = tied
        return overrides

    def check(self) -> None:
        """Raise CheckpointError, naming what differs, unless `fine` can be a fine-tune of `base`."""
        ours, theirs = _architecture(self.base.config), _architecture(self.fine.config)
        for key, value in ours.items():
            if theirs[key] != value:
                raise CheckpointError(f"{self.fine.path}: {key} is {theirs[key]!r}, the base's is {value!r}")
        apart = set(parameters(self.fine)) ^ set(parameters(self.base))
        for name in sorted(apart - {HEAD}):
            where, other = (self.fine, self.base) if name in self.fine else (self.base, self.fine)
            raise CheckpointError(f"tensor {name} is in {where.path} but not in {other.path}")
        for name in self.names:
            self._check_pair(name)
            self.release()

    def _check_pair(self, name: str) -> None:
        base, fine = self.base_tensor(name), self.fine_tensor(name)
        for tensor, path in ((base, self.base.path), (fine, self.fine.path)):
            if tensor.dtype not in DTYPES.values():
                raise CheckpointError(f"tensor {name} of {path} is {tensor.dtype}: only {', '.join(DTYPES)} are read")
        vocabulary = name in (EMBEDDING, HEAD)
        if fine.ndim != base.ndim or fine.ndim not in (1, 2) or fine.shape[vocabulary:] != base.shape[vocabulary:]:
            raise CheckpointError(f"tensor {name} is {list(fine.shape)}, the base's is {list(base.shape)}")
        if vocabulary and fine.shape[0] != self.fine.config.get("vocab_size", fine.shape[0]):
            raise CheckpointError(
                f"tensor {name} has {fine.shape[0]} rows, config.json says vocab_size {self.fine.config['vocab_size']}"
            )
        if fine.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(fine)):
            raise CheckpointError(f"tensor {name} of {self.fine.path} has a value that is not finite")


def parameters(checkpoint: Checkpoint) -> list[str]:
    """Tensors that are parameters in their own right, sorted: no derived buffers, no second name of a tied head."""
    tied = is_tied(checkpoint)
    return [n for n in checkpoint.names if not n.endswith(_BUFFERS) and not (n == HEAD and tied)]


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding. A config that does not say so follows from whether a head is stored."""
    return checkpoint.config.get("tie_word_embeddings", HEAD not in checkpoint)


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for one set of base weights to serve both."""
    found = {key: config.get(key) for key in _ARCHITECTURE}
    heads = config.get("num_attention_heads") or 1
    found["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    found["head_dim"] = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    return found
