"""Adds the deltas of a batch's segments to the product that all rows share: y += x D^T, per segment its own D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from kernels.delta_linear import reference, torch_dense, torch_digits, torch_int8
from kernels.deltas import Int8Delta, LinearDelta, Placed, RowsDelta
from kernels.segments import Segment

Impl = Literal["reference", "int8pack", "digits", "dense"]
INT8PACK_MAX_ROWS, DIGITS_MAX_ROWS = 8, 64
LARGE = 2**19


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
            replaces what stands in its columns.
        segments: need not cover y; slots without deltas are passed over.
        impl: which implementation; None lets `choose` decide per delta.
    """
    active = [s for s in segments if deltas.get(s.slot)]
    inputs = _Inputs(x_TK)
    for segment in active:
        y_RN, x_RK = y_TN[segment.start : segment.stop], x_TK[segment.start : segment.stop]
        for start, delta in deltas[segment.slot]:
            if isinstance(delta, RowsDelta):
                y_RN.index_copy_(1, delta.index_R + start, x_RK @ delta.value_RK.T)
                continue
            product = _product(impl or choose(x_RK, delta, len(active)), inputs, segment, x_RK, delta)
            y_RN[:, start : start + product.shape[1]].add_(product)


def choose(x_RK: torch.Tensor, delta: LinearDelta, sharers: int = 1) -> Impl:
    """The fastest that is as exact as x's dtype. Times: one core, 1024 x 384 bytes.

    int8pack: bfloat16 on a CPU, up to 8 rows, K a multiple of 32 (the kernel has no tail): each byte is read once,
    16 us for one row where expanding and multiplying takes 100.
    digits: float32 on a CPU with byte products, up to 64 rows, no column scales: two to three times faster than
    expanding, after 30 us for the digits, which pay off when several segments share them or the matrix is large.
    dense: everything else. Expand to the compute dtype, then a GEMM.
    """
    if not isinstance(delta, Int8Delta) or x_RK.device.type != "cpu":
        return "dense"
    rows, inner = x_RK.shape
    if x_RK.dtype == torch.bfloat16:
        return "int8pack" if rows <= INT8PACK_MAX_ROWS and inner % 32 == 0 else "dense"
    worth = sharers > 1 or delta.value_PNK.numel() >= LARGE
    fits = x_RK.dtype == torch.float32 and rows <= DIGITS_MAX_ROWS and delta.col_PK is None
    return "digits" if worth and fits and torch_digits.available() else "dense"


class _Inputs:
    """The digits of a batch's rows, made when first needed: of all rows when they are few, else of one segment's."""

    def __init__(self, x_TK: torch.Tensor) -> None:
        self._x_TK = x_TK
        self._all: torch_digits.Digits | None = None

    def digits(self, segment: Segment) -> torch_digits.Digits:
        if self._x_TK.shape[0] > DIGITS_MAX_ROWS:
            return torch_digits.Digits.of(self._x_TK[segment.start : segment.stop])
        if self._all is None:
            self._all = torch_digits.Digits.of(self._x_TK)
        return self._all.rows(segment.start, segment.stop)


def _product(impl: Impl, inputs: _Inputs, segment: Segment, x_RK: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
    match impl:
        case "reference":
            return reference.product(x_RK, delta)
        case "int8pack":
            return torch_int8.product(x_RK, delta)
        case "digits":
            return torch_digits.product(inputs.digits(segment), delta)
        case "dense":
            return torch_dense.product(x_RK, delta)
