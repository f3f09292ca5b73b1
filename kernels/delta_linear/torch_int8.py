"""Products with byte deltas by torch's bfloat16 x int8 CPU kernel, which reads each byte once and accumulates in float32."""

from __future__ import annotations

import torch

from kernels.deltas import Int8Delta, LinearDelta


def product(x_RK: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
    """x D^T [R, N] in bfloat16. x must be bfloat16 on a CPU."""
    assert isinstance(delta, Int8Delta), f"int8pack takes byte deltas, not {type(delta).__name__}"
    y_RN: torch.Tensor | None = None
    for p, value_NK in enumerate(delta.value_PNK):
        inner = x_RK if delta.col_PK is None else x_RK * delta.col_PK[p].to(x_RK.dtype)
        part = torch._weight_int8pack_mm(inner.contiguous(), value_NK, delta.scale_PN[p].to(x_RK.dtype))
        y_RN = part if y_RN is None else y_RN.add_(part)
    assert y_RN is not None, "a byte delta without planes"
    return y_RN
