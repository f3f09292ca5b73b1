"""Adds the deltas of a batch's segments to the product that all rows share: y += x D^T, per segment its own D."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import torch

from kernels.delta_linear import reference, torch_dense, torch_digits, torch_int8
from kernels.deltas import Int8Delta, LinearDelta, Placed, RowsDelta
from kernels.segments import Segment

Impl = Literal["reference", "int8pack", "digits", "dense"]
FEW_ROWS, DIGITS_MAX_ROWS = 8, 64
LARGE = 2**19
Run = list[tuple[Segment, Int8Delta]]


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
        deltas: slot -> its deltas; a slot without any is left out. Several deltas of one place add up; a RowsDelta
            stands first and replaces what the base has in its columns.
        segments: ascending; need not cover y; slots without deltas are passed over.
        impl: which implementation; None lets `choose` decide per delta.
    """
    runs: list[tuple[int, Run]] = []
    last: dict[Hashable, Run] = {}
    active = [segment for segment in segments if deltas.get(segment.slot)]
    for segment in active:
        y_RN, x_RK = y_TN[segment.start : segment.stop], x_TK[segment.start : segment.stop]
        for start, delta in deltas[segment.slot]:
            if isinstance(delta, RowsDelta):
                y_RN.index_copy_(1, delta.index_R + start, x_RK @ delta.value_RK.T)
                continue
            chosen = impl or choose(x_RK, delta, len(active))
            if chosen != "digits":
                product = _product(chosen, x_RK, delta)
                y_RN[:, start : start + product.shape[1]].add_(product)
                continue
            assert isinstance(delta, Int8Delta), f"digits take byte deltas, not {type(delta).__name__}"
            key = (start, delta.value_PNK.shape, delta.col_PK is None)
            if key not in last or last[key][-1][0].stop != segment.start:
                last[key] = []
                runs.append((start, last[key]))
            last[key].append((segment, delta))
    for start, run in runs:
        torch_digits.add_(y_TN[:, start : start + run[0][1].value_PNK.shape[1]], x_TK, run)


def choose(x_RK: torch.Tensor, delta: LinearDelta, sharers: int = 1) -> Impl:
    """The fastest that is as exact as x's dtype.

    int8pack: bfloat16 on a CPU, up to 8 rows, K a multiple of 32 (the kernel has no tail): each byte is read once,
    a fifth of the time of expanding and multiplying.
    digits: float32 on a CPU with byte products, where several segments share the cost of the digits and have few rows,
    or where the matrix is large: half of the time of expanding, less so with more rows.
    dense: everything else. Expand to the compute dtype, then a GEMM.
    """
    if not isinstance(delta, Int8Delta) or x_RK.device.type != "cpu":
        return "dense"
    rows, inner = x_RK.shape
    if x_RK.dtype == torch.bfloat16:
        return "int8pack" if rows <= FEW_ROWS and inner % 32 == 0 else "dense"
    worth = (sharers > 1 and rows <= FEW_ROWS) or (rows <= DIGITS_MAX_ROWS and delta.value_PNK.numel() >= LARGE)
    return "digits" if worth and x_RK.dtype == torch.float32 and torch_digits.available() else "dense"


def _product(impl: Impl, x_RK: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
    match impl:
        case "reference":
            return reference.product(x_RK, delta)
        case "int8pack":
            return torch_int8.product(x_RK, delta)
        case "dense":
            return torch_dense.product(x_RK, delta)
        case "digits":
            raise AssertionError("digits are made for whole runs of segments")
