"""Float32 products with byte deltas in exact integer arithmetic, on CPUs that multiply bytes (AVX-512 VNNI).

Each row of x (times the column scales) becomes 24-bit fixed point relative to its largest value, split into three
signed bytes ("digits", base 256); three byte products, summed exactly in int32, are put together again. The
rounding of x is at most 2^-24 of the row's largest value, so the result is nearer to the exact one than a float32
product is.

Neighbouring segments share every operation but the byte product itself.

Not covered: CPUs without VNNI, where the 16-bit sums of byte products saturate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from kernels.deltas import Int8Delta
from kernels.segments import Segment

LARGEST = 127 * 2**16
"""Largest fixed-point value: its three balanced digits do not overflow."""
_BALANCE = 0x808080


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this CPU multiplies bytes without saturating."""
    return torch.cpu._is_vnni_supported()


@dataclass(frozen=True, slots=True)
class Digits:
    """x[r, k] = unit[r] * sum_i digit[3 r + i, k] * 256^i"""

    digits_SK: torch.Tensor
    """int8, S = 3 R"""
    unit_R1: torch.Tensor

    @classmethod
    def of(cls, x_RK: torch.Tensor) -> Digits:
        """x: float32. Rows with inf or NaN give NaN products."""
        unit_R1 = x_RK.abs().amax(1, keepdim=True).clamp_(min=1e-30).mul_(1 / LARGEST)
        fixed_RK = (x_RK / unit_R1).round_().int()
        # Adding 128 to each byte makes it the unsigned digit; flipping its top bit makes it the signed one.
        bytes_RK4 = fixed_RK.add_(_BALANCE).bitwise_xor_(_BALANCE).view(torch.int8).view(*x_RK.shape, 4)
        return cls(torch.stack(bytes_RK4.unbind(2)[:3], 1).flatten(0, 1), unit_R1)


def add_(y_TN: torch.Tensor, x_TK: torch.Tensor, run: Sequence[tuple[Segment, Int8Delta]]) -> None:
    """y += x D^T, per segment its own D. The segments follow each other, their deltas have one shape."""
    segments, deltas = [segment for segment, _ in run], [delta for _, delta in run]
    first, last = segments[0].start, segments[-1].stop
    x_RK, counts = x_TK[first:last], [segment.rows for segment in segments]
    digits = Digits.of(x_RK) if deltas[0].col_PK is None else None
    for p in range(deltas[0].value_PNK.shape[0]):
        cols = [delta.col_PK[p] for delta in deltas if delta.col_PK is not None]
        plane = digits or Digits.of(x_RK * _per_row(cols, counts))
        product_RN = _product(plane, [delta.value_PNK[p] for delta in deltas], counts)
        y_TN[first:last] += product_RN.mul_(_per_row([delta.scale_PN[p] for delta in deltas], counts))


def _product(x: Digits, values_NK: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """Rows in runs of `counts`, each times its own matrix: float32 [R, N]."""
    sums_SN = x.digits_SK.new_empty((x.digits_SK.shape[0], values_NK[0].shape[0]), dtype=torch.int32)
    inputs, outputs = x.digits_SK.split([3 * n for n in counts]), sums_SN.split([3 * n for n in counts])
    for digits, value_NK, out in zip(inputs, values_NK, outputs, strict=True):
        torch._int_mm(digits, value_NK.T, out=out)  # pyright: ignore[reportPrivateImportUsage]
    return sums_SN.unflatten(0, (-1, 3)).float().mul_(_powers(sums_SN.device)).sum(1).mul_(x.unit_R1)


def _per_row(vectors: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """Vector i for counts[i] rows; a single one is left to broadcasting."""
    if len(vectors) == 1:
        return vectors[0]
    return torch.cat([vector.expand(n, -1) for vector, n in zip(vectors, counts, strict=True)])


@lru_cache(maxsize=4)
def _powers(device: torch.device) -> torch.Tensor:
    return torch.tensor([[1.0], [256.0], [65536.0]], device=device)
