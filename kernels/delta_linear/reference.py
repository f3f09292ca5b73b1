"""The specification of every delta: the matrix that it stands for, in float32, and its product."""

from __future__ import annotations

import torch

from kernels.deltas import DenseDelta, Int8Delta, LinearDelta, LowRankDelta, QuantDelta, RowsDelta, SignDelta


def product(x_RK: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
    """x D^T, computed in float32, in x's dtype."""
    return (x_RK.float() @ matrix(delta).T).to(x_RK.dtype)


def matrix(delta: LinearDelta) -> torch.Tensor:
    """D [N, K] in float32. RowsDelta has none: it replaces rows."""
    match delta:
        case SignDelta():
            return _sign_matrix(delta)
        case LowRankDelta(a_rK, b_Nr):
            return b_Nr.float() @ a_rK.float()
        case DenseDelta(weight_NK):
            return weight_NK.float()
        case QuantDelta():
            values = unpack_values(delta.q_Nk, delta.bits)[:, : delta.in_features] - 2 ** (delta.bits - 1)
            return values * delta.scale_N.float()[:, None]
        case Int8Delta(value_PNK, scale_PN, col_PK):
            planes = value_PNK.float() * scale_PN.float()[:, :, None]
            return (planes if col_PK is None else planes * col_PK.float()[:, None, :]).sum(0)
        case RowsDelta():
            raise AssertionError("RowsDelta replaces rows, it has no difference matrix")


def _sign_matrix(delta: SignDelta) -> torch.Tensor:
    bits = (delta.sign_PNk[..., None] >> torch.arange(8, device=delta.sign_PNk.device)) & 1
    planes = (bits.flatten(2)[..., : delta.in_features].float() * 2 - 1) * delta.scale_PN.float()[:, :, None]
    if delta.col_PK is not None:
        planes = planes * delta.col_PK.float()[:, None, :]
    return planes.sum(0)


def unpack_values(q_Nk: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned `bits`-wide values, LSB first: float32 [N, k * 8 / bits]."""
    shifts = torch.arange(0, 8, bits, device=q_Nk.device)
    return ((q_Nk[..., None] >> shifts) & (2**bits - 1)).flatten(1).float()
