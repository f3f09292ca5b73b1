"""Rotary position embedding (Su et al. 2021), halves layout as in Hugging Face checkpoints, in place."""

from __future__ import annotations

from typing import Literal

import torch

from kernels.rotary import reference, torch_roll

Impl = Literal["reference", "roll"]


def rotary_(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, *, impl: Impl | None = None) -> None:
    """x becomes x * cos + rotate_half(x) * sin. cos and sin [T, D], in x's dtype, hold the first half twice but for the
    sign: the first half of `sin` is negated (`signed_sin`), saving a negation per layer. `roll` serves all devices.
    """
    run = reference.rotary_ if impl == "reference" else torch_roll.rotary_
    run(x_THD, cos_TD, sin_TD)


def signed_sin(sin_TD: torch.Tensor) -> torch.Tensor:
    """`sin` as `rotary_` wants it."""
    half = sin_TD.shape[-1] // 2
    return torch.cat((-sin_TD[:, :half], sin_TD[:, half:]), dim=-1)
