"""Scratch memory of the device kernels. Every launch leaves it ready for the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SLICE = 4096
"""Columns of a row that one program reads"""
BINS = 2560
"""64 for each octave of weights"""
LISTED = 8192
"""How many tokens near a threshold are kept apart; where there are more, the whole row is searched instead"""


@dataclass(frozen=True, slots=True)
class Workspace:
    """For at most S rows of at most V columns: 31 KB per row for its histogram, 64 KB for its list, and little else.

    B = ceil(V / SLICE) slices.
    """

    best_SB: torch.Tensor
    """float32: the largest logit of each slice"""
    where_SB: torch.Tensor
    """int32: its first id, or -1 where the slice holds NaN"""
    sum_SB: torch.Tensor
    """float32: sum of exp(l - best of the slice)"""
    mass_SB: torch.Tensor
    """int64: weights of the slice that are kept"""
    count_SH: torch.Tensor
    """int32 [S, BINS]: histogram of the weights: how many"""
    weight_SH: torch.Tensor
    """int64 [S, BINS]: and their sums"""
    logit_SL: torch.Tensor
    """float32 [S, LISTED]"""
    id_SL: torch.Tensor
    """int32 [S, LISTED]"""
    state_SX: torch.Tensor
    """int64 [S, 16]: what one stage finds out for the next"""
    tickets_SX: torch.Tensor
    """int32 [S, 8]: how many programs of each stage have finished; 0 between launches"""

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device | str) -> Workspace:
        slices = -(-vocab // SLICE)

        def new(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((rows, columns), dtype=dtype, device=device)

        return cls(
            new(slices, torch.float32),
            new(slices, torch.int32),
            new(slices, torch.float32),
            new(slices, torch.int64),
            new(BINS, torch.int32),
            new(BINS, torch.int64),
            new(LISTED, torch.float32),
            new(LISTED, torch.int32),
            new(16, torch.int64),
            new(8, torch.int32),
        )
