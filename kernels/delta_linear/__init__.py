"""Adds the deltas of a batch's segments to the product that all rows share: y += x D^T, per segment its own D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from kernels.delta_linear import reference, torch_dense, torch_int8
from kernels.deltas import Int8Delta, LinearDelta, Placed, RowsDelta
from kernels.segments import Segment

Impl = Literal["reference", "int8pack", "dense"]
INT8PACK_MAX_ROWS = 8


def delta_linear_(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    deltas: Mapping[int, Sequence[Placed]],
    segments: Sequence[Segment],
    *,
    impl: Impl | None = None,
) -> None:
    """In place: rows start:stop of each segment get the products with the deltas of its slot.

    Args:
        y_TN: the base's product; columns that the base does not have (a larger vocabulary) hold zeros.
        deltas: slot -> its deltas; a slot without any is left out. Several deltas of one place add up, but RowsDelta
            replaces what stands in its columns and must come first.
        segments: need not cover y; slots without deltas are passed over.
        impl: which implementation; None lets `choose` decide per delta.
    """
    for segment in segments:
        placed = deltas.get(segment.slot)
        if placed:
            rows = slice(segment.start, segment.stop)
            _add(y_TN[rows], x_TK[rows], placed, impl)


def choose(x_RK: torch.Tensor, delta: LinearDelta) -> Impl:
    """int8pack: bytes on a CPU, bfloat16, few rows: one pass over the bytes, 16 us where expanding and multiplying takes
    100 (1024 x 384, one row). Beyond 8 rows, in other dtypes and on a GPU: expand to the compute dtype, then a GEMM,
    which is exact in that dtype."""
    few = x_RK.shape[0] <= INT8PACK_MAX_ROWS and x_RK.device.type == "cpu" and x_RK.dtype == torch.bfloat16
    return "int8pack" if few and isinstance(delta, Int8Delta) else "dense"


def _add(y_RN: torch.Tensor, x_RK: torch.Tensor, placed: Sequence[Placed], impl: Impl | None) -> None:
    for start, delta in placed:
        if isinstance(delta, RowsDelta):
            y_RN.index_copy_(1, delta.index_R + start if start else delta.index_R, x_RK @ delta.value_RK.T)
            continue
        product = _PRODUCTS[impl or choose(x_RK, delta)](x_RK, delta)
        if product.shape[1] == y_RN.shape[1]:
            y_RN.add_(product)
        else:
            y_RN[:, start : start + product.shape[1]].add_(product)


_PRODUCTS = {"reference": reference.product, "int8pack": torch_int8.product, "dense": torch_dense.product}
