"""Products by expanding the delta to the compute dtype. Low rank and dense deltas need no expanding."""

from __future__ import annotations

from functools import lru_cache

import torch

from kernels.deltas import DenseDelta, Int8Delta, LinearDelta, LowRankDelta, QuantDelta, RowsDelta, SignDelta


def product(x_RK: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
    """x D^T [R, N] in x's dtype."""
    match delta:
        case Int8Delta():
            return scaled(x_RK, [v.to(x_RK.dtype) for v in delta.value_PNK], delta.scale_PN, delta.col_PK)
        case SignDelta():
            planes = [signs(plane, delta.in_features, x_RK.dtype) for plane in delta.sign_PNk]
            return scaled(x_RK, planes, delta.scale_PN, delta.col_PK)
        case LowRankDelta(a_rK, b_Nr):
            return (x_RK @ a_rK.T) @ b_Nr.T
        case DenseDelta(weight_NK):
            return x_RK @ weight_NK.T
        case QuantDelta():
            return _quant(x_RK, delta)
        case RowsDelta():
            raise AssertionError("RowsDelta replaces rows, it has no product of its own")


def scaled(
    x_RK: torch.Tensor, planes: list[torch.Tensor], scale_PN: torch.Tensor, col_PK: torch.Tensor | None
) -> torch.Tensor:
    """sum_p scale[p] * ((x * col[p]) planes[p]^T)."""
    y_RN: torch.Tensor | None = None
    for p, plane_NK in enumerate(planes):
        inner = x_RK if col_PK is None else x_RK * col_PK[p].to(x_RK.dtype)
        part = (inner @ plane_NK.T).mul_(scale_PN[p].to(x_RK.dtype))
        y_RN = part if y_RN is None else y_RN.add_(part)
    assert y_RN is not None, "a sign delta without planes"
    return y_RN


def signs(sign_Nk: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """+1 and -1 [N, K] from packed bits."""
    table = _sign_table(dtype, sign_Nk.device)
    return table.index_select(0, sign_Nk.flatten().int()).view(sign_Nk.shape[0], -1)[:, :in_features]


@lru_cache(maxsize=16)
def _sign_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each byte expands to: [256, 8]."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (bits * 2 - 1).to(device, dtype)


def quant_values(q_Nk: torch.Tensor, bits: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Signed integer values [N, K] of packed unsigned ones."""
    shifts = torch.arange(0, 8, bits, device=q_Nk.device, dtype=torch.uint8)
    values = (q_Nk[..., None] >> shifts) & (2**bits - 1)
    return (values.flatten(1)[:, :in_features].to(torch.int16) - 2 ** (bits - 1)).to(dtype)


def _quant(x_RK: torch.Tensor, delta: QuantDelta) -> torch.Tensor:
    values = quant_values(delta.q_Nk, delta.bits, delta.in_features, x_RK.dtype)
    return (x_RK @ values.T).mul_(delta.scale_N.to(x_RK.dtype))
