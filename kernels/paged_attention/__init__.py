"""Causal attention of a batch's rows over a paged KV cache: decode rows and prompt chunks, grouped heads, windows."""

from __future__ import annotations

from typing import Literal

import torch

from kernels.paged_attention import reference, torch_sdpa
from kernels.paged_attention.plan import AttentionPlan

Impl = Literal["reference", "sdpa"]
__all__ = ["AttentionPlan", "Impl", "paged_attention"]


def paged_attention(
    q_THD: torch.Tensor, kv_X2GD: torch.Tensor, plan: AttentionPlan, *, impl: Impl | None = None
) -> torch.Tensor:
    """[T, H * D]. Scores are scaled by D^-1/2.

    Args:
        q_THD: queries, H heads.
        kv_X2GD: one layer's cache, X = blocks * block_size slots of K and V with G heads, this step's rows written.
            Slots that no sequence of the plan owns are never read: they may hold anything, NaN included.
        plan: who attends to what; the same for all layers with the same window.

    `sdpa` serves every device: sequences with one row of similar length are padded into one call, prompt chunks run one
    by one.
    """
    run = reference.paged_attention if impl == "reference" else torch_sdpa.paged_attention
    return run(q_THD, kv_X2GD, plan)
