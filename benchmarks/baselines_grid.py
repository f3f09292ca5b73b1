"""Low-bit integers on a grid per group, by round-to-nearest or GPTQ: what several baselines store.

GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what rounding one costs is made
up for in those still to come, weighed by the second moment of the inputs. Without act-order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

GROUP = 128
_FRACTIONS = 12
"""Of the whole range, tried as the grid's width: the one of least squared error is taken, as GPTQ's code can."""
_NARROWEST = {2: 0.45, 3: 0.6, 4: 0.7, 8: 1.0}
_DAMPING = 0.01
"""Of the mean diagonal, added to a second moment before it is inverted: GPTQ's own."""
Fit = tuple[torch.Tensor, torch.Tensor]
"""(distance between levels, lowest level), both float16, of each row."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Integers of `bits_r` bits, and per group of them the distance between levels and the lowest level, in float16."""

    q_rL: torch.Tensor
    scale_rG: torch.Tensor
    low_rG: torch.Tensor
    bits_r: torch.Tensor
    group: int

    def __post_init__(self) -> None:
        assert bool((self.q_rL < 2 ** self.bits_r[:, None]).all()), "a code does not fit its bits"

    @property
    def nbytes(self) -> int:
        return math.ceil(int(self.bits_r.sum()) * self.q_rL.shape[1] / 8) + self.scale_rG.nbytes + self.low_rG.nbytes

    def first(self, rows: int) -> Codes:
        return Codes(self.q_rL[:rows], self.scale_rG[:rows], self.low_rG[:rows], self.bits_r[:rows], self.group)

    def values(self) -> torch.Tensor:
        """fp32 [r, L]."""
        scale_rL, low_rL = (_spread(x.float(), self.group, self.q_rL.shape[1]) for x in (self.scale_rG, self.low_rG))
        return self.q_rL.float() * scale_rL + low_rL


def bits_per_value(bits: int, length: int, group: int = GROUP) -> float:
    """Bits that one value of a row of `length` takes, its share of the groups' two numbers included."""
    return bits + math.ceil(length / group) * 32 / length


def round_to_nearest(values_rL: torch.Tensor, bits_r: torch.Tensor, group: int = GROUP) -> Codes:
    """Each value for itself. bits_r: int64 [r]."""
    rows, length = values_rL.shape
    groups = -(-length // group)
    edge = values_rL[:, -1:].expand(rows, groups * group - length)  # what fills the last group must not widen it
    grouped = torch.cat([values_rL, edge], 1).view(rows * groups, group)
    scale_rG, low_rG = (x.view(rows, groups) for x in _fit(grouped, bits_r.repeat_interleave(groups)))
    scale_rL, low_rL = (_spread(x.float(), group, length) for x in (scale_rG, low_rG))
    return Codes(_round(values_rL, scale_rL, low_rL, bits_r[:, None]).to(torch.uint8), scale_rG, low_rG, bits_r, group)


def gptq(weight_NK: torch.Tensor, moment_KK: torch.Tensor, bits: torch.Tensor, group: int = GROUP) -> Codes:
    """Groups along the inputs. bits: int64 [N]; moment: second moment of the inputs."""
    scales: list[torch.Tensor] = []
    lows: list[torch.Tensor] = []

    def grid(column: int, rest: torch.Tensor) -> Fit:
        if column % group == 0:
            scale, low = _fit(rest[:, :group], bits)
            scales.append(scale)
            lows.append(low)
        return scales[-1], lows[-1]

    q = _compensated(weight_NK, moment_KK, grid, lambda column: bits)
    return Codes(q, torch.stack(scales, 1), torch.stack(lows, 1), bits, group)


def gptq_columns(weight_NK: torch.Tensor, moment_KK: torch.Tensor, bits_K: torch.Tensor, group: int = GROUP) -> Codes:
    """Bits for each input, groups along the outputs, their grids those of the weights before any compensation.

    The codes are those of the transposed matrix [K, N].
    """
    before = round_to_nearest(weight_NK.T.contiguous(), bits_K, group)
    scale_KN, low_KN = (_spread(x, group, len(weight_NK)) for x in (before.scale_rG, before.low_rG))
    q = _compensated(
        weight_NK, moment_KK, lambda column, rest: (scale_KN[column], low_KN[column]), lambda column: bits_K[column]
    )
    return Codes(q.T.contiguous(), before.scale_rG, before.low_rG, bits_K, group)


def _compensated(
    weight_NK: torch.Tensor,
    moment_KK: torch.Tensor,
    grid: Callable[[int, torch.Tensor], Fit],
    bits: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """uint8 [N, K]. `grid` is asked with a column's number and the columns from it on, and answers for each row."""
    weight, factor = weight_NK.clone(), _inverse_factor(moment_KK)
    q_NK = torch.empty_like(weight, dtype=torch.uint8)
    for column in range(weight.shape[1]):
        scale, low = (x.float() for x in grid(column, weight[:, column:]))
        q = _round(weight[:, column], scale, low, bits(column))
        error = (weight[:, column] - (q * scale + low)) / factor[column, column]
        weight[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
        q_NK[:, column] = q.to(torch.uint8)
    return q_NK


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moment's inverse, fp32."""
    damped = moment.double()
    mean = damped.diagonal().mean().clamp_min(1e-12)
    damped = damped + _DAMPING * mean * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _fit(values_nG: torch.Tensor, bits_n: torch.Tensor) -> Fit:
    """Of each row: its whole range, or the part of it in the middle that has the least squared error."""
    top = (2**bits_n - 1).float()[:, None]
    least, most = values_nG.amin(1, keepdim=True), values_nG.amax(1, keepdim=True)
    narrowest = min(_NARROWEST[bits] for bits in set(bits_n.tolist()))
    best = torch.full_like(least, torch.inf)
    scale, low = torch.ones_like(least).half(), torch.zeros_like(least).half()
    for fraction in torch.linspace(1.0, narrowest, _FRACTIONS if narrowest < 1 else 1).tolist():
        tried = (fraction * (most - least) / top).half()
        tried = torch.where(tried == 0, torch.ones_like(tried), tried)
        offset = ((least + most - fraction * (most - least)) / 2).half()
        q = _round(values_nG, tried.float(), offset.float(), bits_n[:, None])
        error = (values_nG - (q * tried.float() + offset.float())).square().sum(1, keepdim=True)
        better = error < best
        best, scale, low = (
            torch.where(better, new, old) for new, old in ((error, best), (tried, scale), (offset, low))
        )
    return scale[:, 0], low[:, 0]


def _round(values: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    top = (2**bits - 1).float()
    return ((values - low) / scale).round().clamp(min=torch.zeros_like(top), max=top)


def _spread(per_group: torch.Tensor, group: int, length: int) -> torch.Tensor:
    return per_group.repeat_interleave(group, 1)[:, :length]
