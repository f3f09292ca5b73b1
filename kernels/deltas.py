"""The compute forms of a delta's tensors: what the ops of this package take.

Shapes: N outputs (or vocabulary rows), K inputs, P planes, r rank, R rows.
All are plain tensors, typically views into one slab; none owns memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SignDelta:
    """D = sum_p scale[p] * row[p, n] * col[p, k] * (+1 where the bit is set, else -1)   (BitDelta, section 3.1).

    Bits stand LSB first along K; the last byte of a row is padded with zeros when 8 does not divide K.
    """

    sign_PNk: torch.Tensor
    """uint8 [P, N, ceil(K / 8)]"""
    scale_P: torch.Tensor
    """float32 [P]"""
    row_PN: torch.Tensor | None
    """float16 [P, N], or None: one scale per matrix"""
    col_PK: torch.Tensor | None
    """float16 [P, K], or None"""
    in_features: int


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """D = B A, the adapter's scaling already folded into B."""

    a_rK: torch.Tensor
    b_Nr: torch.Tensor


@dataclass(frozen=True, slots=True)
class DenseDelta:
    """D itself."""

    weight_NK: torch.Tensor


@dataclass(frozen=True, slots=True)
class QuantDelta:
    """D = (q - 2^(bits-1)) * scale[n] for the rows that the base has too; `extra` are whole rows beyond them.

    `bits` is 2, 4 or 8; values stand LSB first along K, padded with zeros in the last byte.
    """

    q_Nk: torch.Tensor
    """uint8 [N, ceil(K * bits / 8)]"""
    scale_N: torch.Tensor
    """float32 [N]"""
    extra_EK: torch.Tensor
    """[E, K]: whole rows (not differences) N..N+E of a larger vocabulary"""
    bits: int
    in_features: int


@dataclass(frozen=True, slots=True)
class RowsDelta:
    """Whole rows (not differences) that replace or extend the base's: row index[i] is value[i]."""

    index_R: torch.Tensor
    """int64 [R], ascending; indices beyond the base's rows extend it"""
    value_RK: torch.Tensor


LinearDelta = SignDelta | LowRankDelta | DenseDelta | QuantDelta | RowsDelta
