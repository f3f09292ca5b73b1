"""The compute form of one variant: everything that its rows need beside the base. Tensors are views into the slab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitdelta_core.models.config import ModelConfig
from kernels.deltas import LinearDelta


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantWeights:
    """One variant, ready to compute with.

    Keys are Hugging Face parameter names (`model.layers.0.self_attn.q_proj.weight`). What equals the base is absent.
    """

    config: ModelConfig
    """The base's config with the delta's overrides (rope, context length, vocabulary)."""
    linears: Mapping[str, tuple[LinearDelta, ...]]
    """2-D parameters, embedding and head included: their differences (several add up)."""
    vectors: Mapping[str, torch.Tensor]
    """1-D parameters (norms, biases): whole values."""
