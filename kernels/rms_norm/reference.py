"""The specification, in float32."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight"""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def add_norm(
    residual_TK: torch.Tensor, added_TK: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + added in the residual's dtype, its norm in `dtype`, rounded before the weight and after it)."""
    residual_TK = residual_TK if added_TK is None else (residual_TK.float() + added_TK).to(residual_TK.dtype)
    one = torch.ones(residual_TK.shape[-1], device=residual_TK.device)
    normal_TK = rms_norm(residual_TK.float(), one, eps).to(dtype)
    return residual_TK, (normal_TK.float() * weight.float()).to(dtype)
