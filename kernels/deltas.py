"""The compute forms of a delta's tensors: what the ops of this package take.

Shapes: N outputs (or vocabulary rows), K inputs, P planes, r rank, R rows.
All are plain tensors, typically views into one slab; none owns memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SignDelta:
    """D = sum_p scale[p, n] * col[p, k] * (+1 where the bit is set, else -1)   (BitDelta, section 3.1).

    Bits stand LSB first along K; the last byte of a row is padded with zeros when 8 does not divide K. The scale of the
    matrix and of each row are one factor here, so that fused linears (q, k, v in one) are one delta.
    """

    sign_PNk: torch.Tensor
    """uint8 [P, N, ceil(K / 8)]"""
    scale_PN: torch.Tensor
    """float32 [P, N]"""
    col_PK: torch.Tensor | None
    """float32 [P, K], or None"""
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
    """D = (q - 2^(bits-1)) * scale[n]. Rows that a larger vocabulary adds stand in a RowsDelta beside it.

    `bits` is 2, 4 or 8; values stand LSB first along K, padded with zeros in the last byte.
    """

    q_Nk: torch.Tensor
    """uint8 [N, ceil(K * bits / 8)]"""
    scale_N: torch.Tensor
    """float32 [N]"""
    bits: int
    in_features: int


@dataclass(frozen=True, slots=True)
class RowsDelta:
    """Whole rows (not differences) that replace or extend the base's: row index[i] is value[i]."""

    index_R: torch.Tensor
    """int64 [R], ascending; indices beyond the base's rows extend it"""
    value_RK: torch.Tensor


@dataclass(frozen=True, slots=True)
class Int8Delta:
    """D = sum_p value[p, n, k] * scale[p, n] * col[p, k]: signs or quantised differences, one byte each.

    8 times the bytes of packed signs, for CPUs, where unpacking costs several times the product itself.
    """

    value_PNK: torch.Tensor
    """int8 [P, N, K]"""
    scale_PN: torch.Tensor
    """[P, N] in the compute dtype"""
    col_PK: torch.Tensor | None
    """[P, K] in the compute dtype, or None"""


LinearDelta = SignDelta | LowRankDelta | DenseDelta | QuantDelta | RowsDelta | Int8Delta
Placed = tuple[int, LinearDelta]
"""A delta and the first output of a fused linear (q, k, v in one) that it belongs to."""
