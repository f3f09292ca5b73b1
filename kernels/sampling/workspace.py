"""Scratch memory of the device kernels, and how they cut up a row. Every launch leaves it ready for the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import configs

BINS = 2560
"""64 for each octave of weights"""


@dataclass(frozen=True, slots=True)
class Config:
    """How a row is cut. Powers of two."""

    columns: int = 1024
    """Of a row, held by one program"""
    listed: int = 8192
    """How many tokens near a threshold are kept apart; where there are more, the whole row is searched instead"""
    searched: int = 1024
    """Of those, held at a time"""
    warps: int = 4
    search_warps: int = 8


def config_for(vocab: int, device: torch.device) -> Config:
    """What was measured for this device and width, keyed `V=<width>`; else the default."""
    if device.type != "cuda":
        return Config()
    return Config(**(configs.lookup("sampling", torch.cuda.get_device_name(device), f"V={vocab}") or {}))


@dataclass(frozen=True, slots=True)
class Workspace:
    """For at most S rows of at most V columns: 30 KB a row for its histogram, 64 KB for its list, and little else.

    B = ceil(V / config.columns) slices of a row.
    """

    config: Config
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
    """float32 [S, config.listed]"""
    id_SL: torch.Tensor
    """int32 [S, config.listed]"""
    state_SX: torch.Tensor
    """int64 [S, 16]: what one stage finds out for the next"""
    level_SX: torch.Tensor
    """float32 [S, 8]: logits that it finds out"""
    tickets_SX: torch.Tensor
    """int32 [S, 8]: how many programs of each stage have finished; 0 between launches"""

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device | str, config: Config | None = None) -> Workspace:
        config = config or config_for(vocab, torch.device(device))
        slices = -(-vocab // config.columns)

        def new(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((rows, columns), dtype=dtype, device=device)

        return cls(
            config,
            new(slices, torch.float32),
            new(slices, torch.int32),
            new(slices, torch.float32),
            new(slices, torch.int64),
            new(BINS, torch.int32),
            new(BINS, torch.int64),
            new(config.listed, torch.float32),
            new(config.listed, torch.int32),
            new(16, torch.int64),
            new(8, torch.float32),
            torch.zeros((rows, 8), dtype=torch.int32, device=device),
        )
