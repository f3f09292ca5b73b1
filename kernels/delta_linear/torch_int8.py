"""Products with byte deltas by torch's bfloat16 x int8 CPU kernel: each byte is read once, sums are float32."""

from __future__ import annotations

import torch

from kernels.deltas import Int8Delta, LinearDelta


def product(x_RK: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
    """x D^T [R, N] in bfloat16. x must be bfloat16 on a CPU, K a multiple of 32: the kernel reads whole vectors."""
    assert x_RK.shape[1] % 32 == 0, f"int8pack needs K to be a multiple of 32, got {x_RK.shape[1]}"
    assert isinstance(delta, Int8Delta), f"int8pack takes byte deltas, not {type(delta).__name__}"
    y_RN: torch.Tensor | None = None
    for p, value_NK in enumerate(delta.value_PNK):
        inner = x_RK if delta.col_PK is None else x_RK * delta.col_PK[p].to(x_RK.dtype)
        scale_N = delta.scale_PN[p].to(x_RK.dtype)
        part = torch._weight_int8pack_mm(inner.contiguous(), value_NK, scale_N)  # pyright: ignore[reportPrivateImportUsage]
        y_RN = part if y_RN is None else y_RN.add_(part)
    assert y_RN is not None, "a byte delta without planes"
    return y_RN
