"""What one forward pass is given: all of it, and nothing ambient.

Shapes: T rows (tokens) of the step, S sequences, M blocks per sequence (padded), L rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitdelta_core.models.variant import VariantWeights
from kernels.segments import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step of the engine.

    The rows of one sequence are consecutive and in position order; sequences of one variant are neighbours, so that
    `segments` (over T) and `logit_segments` (over L) each hold one entry per variant.
    """

    token_ids_T: torch.Tensor
    """int64. Ids in the variant's own vocabulary."""
    positions_T: torch.Tensor
    """int64. Position of each row in its sequence."""
    kv_slots_T: torch.Tensor
    """int64. Where each row's K and V go: block * block_size + offset."""
    query_starts: tuple[int, ...]
    """S + 1 row offsets: sequence s owns rows query_starts[s]:query_starts[s + 1]."""
    context_lens: tuple[int, ...]
    """S lengths, this step's rows included."""
    block_tables_SM: torch.Tensor
    """int32, padded with 0 (block 0 is never given to a sequence)."""
    logit_rows_L: torch.Tensor
    """int64, ascending rows of T whose logits are wanted."""
    segments: tuple[Segment, ...]
    logit_segments: tuple[Segment, ...]
    variants: Mapping[int, VariantWeights]
    """Slot -> compute form, for every slot named in `segments`."""

    @property
    def rows(self) -> int:
        return self.token_ids_T.shape[0]
