"""Three operations: swap the halves, multiply, multiply and add."""

from __future__ import annotations

import torch


def rotary_(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> None:
    """As the reference, with sin's first half negated."""
    swapped = torch.roll(x_THD, x_THD.shape[-1] // 2, -1)
    x_THD.mul_(cos_TD[:, None]).addcmul_(swapped, sin_TD[:, None])
