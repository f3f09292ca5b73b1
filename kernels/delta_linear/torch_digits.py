"""Float32 products with byte deltas in exact integer arithmetic, on CPUs that multiply bytes (AVX-512 VNNI).

Each row of x becomes 24-bit fixed point relative to its largest value, split into three signed bytes ("digits", base
256); three byte products, summed exactly in int32, are put together again. The rounding of x is at most 2^-24 of the
row's largest value, so the result is nearer to the exact one than a float32 product is. The digits of a batch's rows
serve all its segments.

Not covered: column scales (they would need digits per plane); CPUs without VNNI, where the 16-bit sums of byte products
saturate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kernels.deltas import Int8Delta, LinearDelta

LARGEST = 127 * 2**16
"""Largest fixed-point value: its three balanced digits do not overflow."""
_BALANCE = 0x808080


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this CPU multiplies bytes without saturating."""
    return torch.cpu._is_vnni_supported()


@dataclass(frozen=True, slots=True)
class Digits:
    """x[r, k] = unit[r] * sum_i digit[r, i, k] * 256^i"""

    digits_R3K: torch.Tensor
    """int8"""
    unit_R1: torch.Tensor

    @classmethod
    def of(cls, x_RK: torch.Tensor) -> Digits:
        """x: float32. Rows with inf or NaN give NaN products."""
        unit_R1 = torch.linalg.vector_norm(x_RK, torch.inf, dim=1, keepdim=True).clamp_(min=1e-30).mul_(1 / LARGEST)
        fixed_RK = (x_RK / unit_R1).round_().int()
        # Adding 128 to each byte makes it the unsigned digit; flipping its top bit makes it the signed one.
        bytes_RK4 = fixed_RK.add_(_BALANCE).bitwise_xor_(_BALANCE).view(torch.int8).view(*x_RK.shape, 4)
        return cls(bytes_RK4[..., :3].transpose(1, 2).contiguous(), unit_R1)

    def rows(self, start: int, stop: int) -> Digits:
        return Digits(self.digits_R3K[start:stop], self.unit_R1[start:stop])


def product(x: Digits, delta: LinearDelta) -> torch.Tensor:
    """x D^T [R, N] in float32."""
    assert isinstance(delta, Int8Delta), f"digits take byte deltas, not {type(delta).__name__}"
    assert delta.col_PK is None, "digits do not take column scales"
    flat_SK = x.digits_R3K.flatten(0, 1)
    y_RN: torch.Tensor | None = None
    for value_NK, scale_N in zip(delta.value_PNK, delta.scale_PN, strict=True):
        sums_SN = torch._int_mm(flat_SK, value_NK.T)  # pyright: ignore[reportPrivateImportUsage]
        sums_R3N = sums_SN.unflatten(0, (-1, 3)).float()
        part = sums_R3N.mul_(_powers(flat_SK.device)).sum(1).mul_(x.unit_R1).mul_(scale_N)
        y_RN = part if y_RN is None else y_RN.add_(part)
    assert y_RN is not None, "a byte delta without planes"
    return y_RN


@lru_cache(maxsize=4)
def _powers(device: torch.device) -> torch.Tensor:
    return torch.tensor([[1.0], [256.0], [65536.0]], device=device)
