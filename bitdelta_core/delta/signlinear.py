"""A linear layer whose weight is base + sign delta, with exact gradients to its scales and to its input.

The authors' kernel had no backward, so the gradient to earlier layers skipped the sign branch. Here both branches are
in the graph: the product with the signs is a linear map whose adjoint is the product with their transpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitdelta_core.delta.bitdelta import unpack
from bitdelta_core.delta.spec import TensorEntry


class _SignProduct(torch.autograd.Function):
    """x [..., K] times the transpose of the signs [N, K]; the signs are unpacked when needed, never kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed_Nk: torch.Tensor) -> torch.Tensor:
        ctx.packed_Nk = packed_Nk
        ctx.k = x.shape[-1]
        return x @ unpack(packed_Nk, ctx.k).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ unpack(ctx.packed_Nk, ctx.k).to(grad.dtype), None


class SignLinear(nn.Module):
    """y = x W^T + b + sum_p scale_p * row_p * ((x * col_p) S_p^T).

    What is trained are factors on the stored scales, all 1 at first, so that one learning rate suits scales of any
    size. Their exact products are what `scales()` gives back.
    """

    def __init__(self, linear: nn.Linear, entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.entry = entry
        self.sign_PNk = nn.Buffer(parts["sign"].clone(), persistent=False)
        self.initial = {part: parts[part].float() for part in ("scale", "row", "col") if part in parts}
        self.factors = nn.ParameterDict({part: torch.ones_like(value) for part, value in self.initial.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]"""
        y = functional.linear(x, self.linear.weight, self.linear.bias)
        scales = {part: self._scale(part) for part in self.initial}
        for p in range(self.entry.planes):
            inner = x * scales["col"][p].to(x.dtype) if "col" in scales else x
            branch = _SignProduct.apply(inner, self.sign_PNk[p])
            outer = scales["scale"][p] * scales["row"][p] if "row" in scales else scales["scale"][p]
            y = y + branch * outer.to(x.dtype)
        return y

    def scales(self) -> dict[str, torch.Tensor]:
        """The trained parts under their full names, in the dtypes that are stored."""
        specs = self.entry.parts()
        return {
            self.entry.part_name(part): self._scale(part).detach().cpu().clamp(-65504, 65504).to(specs[part][0])
            for part in self.initial
        }

    def _scale(self, part: str) -> torch.Tensor:
        return self.initial[part].to(self.factors[part].device) * self.factors[part]
