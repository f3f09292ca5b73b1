"""The specification: each variant's whole table, in float32, indexed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kernels.delta_linear.reference import matrix
from kernels.deltas import Placed, RowsDelta
from kernels.segments import Segment


def embedding(
    ids_T: torch.Tensor, weight_VK: torch.Tensor, deltas: Mapping[int, Sequence[Placed]], segments: Sequence[Segment]
) -> torch.Tensor:
    """[T, K]"""
    tables = [merged(weight_VK, deltas.get(segment.slot, ())) for segment in segments]
    parts = [table[ids_T[s.start : s.stop]] for table, s in zip(tables, segments, strict=True)]
    return torch.cat(parts).to(weight_VK.dtype)


def merged(weight_VK: torch.Tensor, placed: Sequence[Placed]) -> torch.Tensor:
    """The variant's own matrix in float32: base rows, zeros where the base has none, deltas applied in order."""
    extents = [int(d.index_R[-1]) + 1 if isinstance(d, RowsDelta) else s + matrix(d).shape[0] for s, d in placed]
    table = weight_VK.new_zeros((max([weight_VK.shape[0], *extents]), weight_VK.shape[1]), dtype=torch.float32)
    table[: weight_VK.shape[0]] = weight_VK.float()
    for start, delta in placed:
        if isinstance(delta, RowsDelta):
            table[delta.index_R + start] = delta.value_RK.float()
        else:
            difference = matrix(delta)
            table[start : start + difference.shape[0]] += difference
    return table
