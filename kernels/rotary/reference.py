"""The specification: each pair (i, i + D/2) is turned by its angle, in float32."""

from __future__ import annotations

import torch


def rotary_(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> None:
    """As `kernels.rotary.rotary_`."""
    half = x_THD.shape[-1] // 2
    first, second = x_THD[..., :half].float(), x_THD[..., half:].float()
    cos, sin = cos_TD[:, None, half:].float(), sin_TD[:, None, half:].float()
    x_THD.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
