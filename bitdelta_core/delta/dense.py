"""Codec `dense`: the fine-tune's own tensor, whole. Exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitdelta_core.delta.spec import TensorEntry


def encode(base: torch.Tensor, fine: torch.Tensor, entry: TensorEntry) -> tuple[TensorEntry, dict[str, torch.Tensor]]:
    """Keep `fine` as it is (in the entry's dtype)."""
    return entry, {"value": fine.to(entry.dtype)}


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's tensor, fp32."""
    return parts["value"].float()
