"""Gathers the base's rows for the whole batch at once, then corrects the segments whose variant changed some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kernels.delta_linear.torch_dense import quant_values, signs
from kernels.deltas import DenseDelta, Int8Delta, LinearDelta, LowRankDelta, Placed, QuantDelta, RowsDelta, SignDelta
from kernels.segments import Segment


def embedding(
    ids_T: torch.Tensor, weight_VK: torch.Tensor, deltas: Mapping[int, Sequence[Placed]], segments: Sequence[Segment]
) -> torch.Tensor:
    """[T, K]"""
    vocabulary = weight_VK.shape[0]
    changed = [s for s in segments if deltas.get(s.slot)]
    if not changed:
        return weight_VK.index_select(0, ids_T)
    x_TK = weight_VK.index_select(0, ids_T.clamp(max=vocabulary - 1))
    x_TK.masked_fill_((ids_T >= vocabulary)[:, None], 0)
    for segment in changed:
        rows = slice(segment.start, segment.stop)
        for start, delta in deltas[segment.slot]:
            _correct(x_TK[rows], ids_T[rows] - start if start else ids_T[rows], delta)
    return x_TK


def _correct(x_RK: torch.Tensor, ids_R: torch.Tensor, delta: LinearDelta) -> None:
    if isinstance(delta, RowsDelta):
        if delta.index_R.shape[0]:
            at_R = torch.searchsorted(delta.index_R, ids_R).clamp_(max=delta.index_R.shape[0] - 1)
            hit_R1 = (delta.index_R.index_select(0, at_R) == ids_R)[:, None]
            x_RK.copy_(torch.where(hit_R1, delta.value_RK.index_select(0, at_R), x_RK))
        return
    count = _row_count(delta)
    if count:
        inside_R1 = ((ids_R >= 0) & (ids_R < count))[:, None]
        x_RK.add_(_rows(delta, ids_R.clamp(0, count - 1), x_RK.dtype).masked_fill_(~inside_R1, 0))


def _row_count(delta: LinearDelta) -> int:
    match delta:
        case Int8Delta(value_PNK):
            return value_PNK.shape[1]
        case SignDelta(sign_PNk):
            return sign_PNk.shape[1]
        case LowRankDelta(_, b_Nr):
            return b_Nr.shape[0]
        case DenseDelta(weight_NK):
            return weight_NK.shape[0]
        case QuantDelta(q_Nk):
            return q_Nk.shape[0]
        case RowsDelta():
            raise AssertionError("RowsDelta replaces rows")


def _rows(delta: LinearDelta, ids_R: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the difference, a fresh tensor."""
    match delta:
        case Int8Delta(value_PNK, scale_PN, col_PK):
            values_PRK = value_PNK[:, ids_R].float() * scale_PN[:, ids_R, None]
            return (values_PRK if col_PK is None else values_PRK * col_PK[:, None]).sum(0).to(dtype)
        case SignDelta():
            return _sign_rows(delta, ids_R).to(dtype)
        case LowRankDelta(a_rK, b_Nr):
            return b_Nr.index_select(0, ids_R) @ a_rK
        case DenseDelta(weight_NK):
            return weight_NK.index_select(0, ids_R)
        case QuantDelta():
            values = quant_values(delta.q_Nk.index_select(0, ids_R), delta.bits, delta.in_features, torch.float32)
            return (values * delta.scale_N.index_select(0, ids_R)[:, None]).to(dtype)
        case RowsDelta():
            raise AssertionError("RowsDelta replaces rows")


def _sign_rows(delta: SignDelta, ids_R: torch.Tensor) -> torch.Tensor:
    total = delta.scale_PN.new_zeros((ids_R.shape[0], delta.in_features))
    for p, sign_Nk in enumerate(delta.sign_PNk):
        part = signs(sign_Nk.index_select(0, ids_R), delta.in_features, total.dtype)
        part = part * delta.scale_PN[p].index_select(0, ids_R)[:, None]
        total += part if delta.col_PK is None else part * delta.col_PK[p]
    return total
