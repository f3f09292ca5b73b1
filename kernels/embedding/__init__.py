"""Embedding rows of several variants: the base's row plus the variant's difference, or the variant's own row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from kernels.deltas import Placed
from kernels.embedding import reference, torch_gather
from kernels.segments import Segment

Impl = Literal["reference", "gather"]


def embedding(
    ids_T: torch.Tensor,
    weight_VK: torch.Tensor,
    deltas: Mapping[int, Sequence[Placed]],
    segments: Sequence[Segment],
    *,
    impl: Impl | None = None,
) -> torch.Tensor:
    """[T, K] in the weight's dtype. Ids beyond the base's V rows belong to variants whose deltas have those rows.

    `gather` serves every device: it touches only the rows asked for. `reference` builds each variant's whole table.
    """
    run = reference.embedding if impl == "reference" else torch_gather.embedding
    return run(ids_T, weight_VK, deltas, segments)
