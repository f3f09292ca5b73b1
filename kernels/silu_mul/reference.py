"""The specification, in float32."""

from __future__ import annotations

import torch
from torch.nn import functional


def silu_mul(gate_up_TN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """silu(gate) * up in float32, rounded once: [T, I] in `dtype` from [T, 2 I]."""
    gate_TI, up_TI = gate_up_TN.float().chunk(2, dim=-1)
    return (functional.silu(gate_TI) * up_TI).to(dtype)
