"""Tensors without memory, for launches that are only compiled."""

from __future__ import annotations

import torch

from kernels.device import FIELDS, DeviceDeltas


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def tables(targets: int, variants: int = 64) -> DeviceDeltas:
    return DeviceDeltas(meta(2**20, dtype=torch.uint8), ints(variants + 1, targets, FIELDS), ints(variants + 1))


def entries(rows: int) -> torch.Tensor:
    """entry_T"""
    return ints(rows)
