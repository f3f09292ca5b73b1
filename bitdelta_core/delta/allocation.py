"""Spreading a budget of bits over all matrices of a delta at once, and over the components of each.

Each difference D [N, K] is decomposed where errors weigh what they cost the model: with M_K the second moment of the
inputs and M_N that of the loss's gradients at the outputs, M_N^(1/2) D M_K^(1/2) = U S V^T. Rounding a value of
component i of a factor with step t costs s_i * t^2 / 12 times the mean weight, so equal costs need steps
delta / sqrt(s_i * weight): one number delta for the whole delta decides everything (reverse water-filling; Cover and
Thomas, section 10.3), and bisection finds the delta that fits the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bitdelta_core.delta import entropy
from bitdelta_core.delta.spectral import STEPS_PER_OCTAVE, Coded, component_scales

RIDGE = 0.2
"""Of the mean, added to every second moment: tasks differ from calibration text. 0.02 and 1 kept less."""
_HALVINGS = 18
_OVERHEAD_BITS = 24
"""Of a component: its exponent and two spreads."""
_MATRIX_BITS = 8 * 40
"""Of a matrix: scale, flush, rounding up."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What an error costs along one side: a second moment [M, M], its diagonal [M], or None where all weigh alike."""

    moment: torch.Tensor | None = None

    def roots(self, size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(root, inverse root, mean weight), the roots [M, M] or [M], the ridge included."""
        if self.moment is None:
            ones = torch.ones(size, dtype=torch.float64)
            return ones, ones, 1.0
        moment = self.moment.double()
        if moment.ndim == 1:
            weight = moment + moment.mean().clamp_min(1e-30)  # rare rows may not be rare in the task: a full mean
            return weight.sqrt(), weight.rsqrt(), weight.mean().item()
        mean = moment.diagonal().mean().clamp_min(1e-30)
        values, vectors = torch.linalg.eigh(moment + RIDGE * mean * torch.eye(size, dtype=torch.float64))
        roots = values.clamp_min(1e-3 * RIDGE * mean).sqrt()
        return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T, (mean * (1 + RIDGE)).item()


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A difference decomposed: D = sum_i b_i a_i^T, with s descending."""

    a_rK: torch.Tensor
    b_rN: torch.Tensor
    s_r: torch.Tensor
    weights: tuple[float, float]
    """Mean weight of an error in a and in b."""

    @property
    def numel(self) -> int:
        return self.a_rK.shape[1] * self.b_rN.shape[1]


def decompose(difference: torch.Tensor, inputs: Metric, outputs: Metric, rank: int) -> Spectrum:
    """The first `rank` components of fp32 [N, K]."""
    rows, columns = difference.shape
    root_n, inverse_n, weight_n = outputs.roots(rows)
    root_k, inverse_k, weight_k = inputs.roots(columns)
    weighted = _right(_left(root_n, difference.double()), root_k)
    u, s, v = _svd(weighted, min(rank, rows, columns))
    balance = s.sqrt()
    return Spectrum(
        a_rK=_right((v * balance).T, inverse_k).float(),
        b_rN=_left(inverse_n, u * balance).T.float(),
        s_r=s.float(),
        weights=(weight_k, weight_n),
    )


@dataclass(frozen=True, slots=True)
class Scaled:
    """A spectrum in units of its steps: what is stored are these values, rounded."""

    a_rK: torch.Tensor
    b_rN: torch.Tensor
    scale: float
    exponent_r: torch.Tensor

    def rounded(self) -> Coded | None:
        """None where nothing is left."""
        a_rK, b_rN = (
            side.round().clamp(-entropy.LIMIT, entropy.LIMIT).to(torch.int8) for side in (self.a_rK, self.b_rN)
        )
        used = a_rK.any(1) & b_rN.any(1)
        return Coded(a_rK[used], b_rN[used], self.scale, self.exponent_r[used]) if used.any() else None


def scaled(spectrum: Spectrum, delta: float) -> Scaled | None:
    """In units of the steps that `delta` gives; None where every component is below it."""
    count = int((spectrum.s_r > delta).sum())
    if not count:
        return None
    s_r, (weight_a, weight_b) = spectrum.s_r[:count], spectrum.weights
    a_rK, b_rN = spectrum.a_rK[:count], spectrum.b_rN[:count]
    step_a = torch.maximum(delta * (s_r * weight_a).rsqrt(), a_rK.abs().amax(1) / entropy.LIMIT)
    step_b = torch.maximum(delta * (s_r * weight_b).rsqrt(), b_rN.abs().amax(1) / entropy.LIMIT)
    product = step_a * step_b
    scale = product.max()
    exponent_r = (STEPS_PER_OCTAVE * (scale / product).log2()).floor().clamp(0, 255)
    step_a = component_scales(scale, exponent_r) / step_b
    return Scaled(a_rK / step_a[:, None], b_rN / step_b[:, None], scale.item(), exponent_r.to(torch.uint8))


def quantise(spectrum: Spectrum, delta: float) -> Coded | None:
    """Round to the steps that `delta` gives; None where nothing is left."""
    found = scaled(spectrum, delta)
    return None if found is None else found.rounded()


def code_bits(coded: Coded | None) -> float:
    """Bits that storing takes, to within a fraction of a per cent; never much less than it really takes."""
    if coded is None:
        return 0.0
    symbols = coded.a_rK.numel() + coded.b_rN.numel()
    flush = 32 * entropy.lanes_of(symbols)
    values = sum(entropy.best_classes(side)[1].sum().item() for side in (coded.a_rK, coded.b_rN))
    return 1.002 * values + flush + _OVERHEAD_BITS * coded.rank + _MATRIX_BITS


def fit(spectra: Mapping[str, Callable[[], Spectrum]], budget_bits: float) -> float:
    """The smallest delta whose code fits the budget. Spectra are fetched one at a time."""

    def spent(delta: float) -> float:
        total = 0.0
        for load in spectra.values():
            total += code_bits(quantise(load(), delta))
            if total > budget_bits:
                break
        return total

    high = max((load().s_r[0].item() for load in spectra.values()), default=0.0)
    low = high * 1e-7
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if spent(middle) > budget_bits:
            low = middle
        else:
            high = middle
    return high


def _left(root: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _right(matrix: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    return matrix * root if root.ndim == 1 else matrix @ root


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [N, r], s [r], V [K, r]) through the smaller Gram matrix: exact enough in float64, and fast."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = _svd(matrix.T, rank)
        return u, s, v
    v = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    scaled = matrix @ v
    s = scaled.norm(dim=0)
    return scaled / s.clamp_min(1e-300), s, v
