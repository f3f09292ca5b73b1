"""Spreading a budget of bits over all matrices of a delta at once, and over the components of each.

Each difference D [N, K] is decomposed where errors weigh what they cost the model: with M_K the second moment of the
inputs and M_N that of the loss's gradients at the outputs, L_N^T D L_K = U S V^T where L L^T = M. Both are measured on
calibration text, which is not the task. But what training added up is gradients times inputs of the task: D^T D and
D D^T say where these lie, and have their share of M_K and M_N. Rounding a value of
component i of a factor with step t costs s_i * t^2 / 12 times the mean weight, so equal costs need steps
delta / sqrt(s_i * weight): one number delta for the whole delta decides everything (reverse water-filling; Cover and
Thomas, section 10.3), and bisection finds the delta that fits the budget. All of it runs where the difference lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from bitdelta_core.delta import entropy, feedback
from bitdelta_core.delta.moments import Metric
from bitdelta_core.delta.spectral import STEPS_PER_OCTAVE, Coded, component_scales

RIDGE = 0.2
"""Of the mean, added to every second moment: tasks differ from calibration text. 0.02 and 1 kept less."""
OWN = 2.0
"""The difference's own second moments for each of the text's. 0 kept far less of a skill, docs/log.md."""
_HALVINGS = 18
_SAMPLED = 256
"""Columns of a side that stand for all of them while the budget is spread."""
_CORRECTIONS, _FILLED = 5, 0.997
_TOGETHER = {"cuda": 1 << 28, "cpu": 1 << 24}
"""Values that are rounded together."""
_LARGEST = 8192
"""Side of which errors are weighed by more than their mean while rounding: the factors of larger ones fill disks."""
_DOUBLED = 1 << 27
"""Values; the heads of large vocabularies have more, of which several copies in float64 fill a machine."""
_LEAST_KEPT = 0.05
_OVERHEAD_BITS = 24
"""Of a component: its exponent and two spreads."""
_MATRIX_BITS = 8 * 40
"""Of a matrix: scale, flush, rounding up."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A difference decomposed: D = sum_i b_i a_i^T, with s descending."""

    a_rK: torch.Tensor
    b_rN: torch.Tensor
    s_r: torch.Tensor
    weights: tuple[float, float]
    """Mean weight of an error in a and in b."""
    factors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    """fp16 [M, M] for a and for b: L of what weighs errors, over the root of its mean; None: each value for itself."""

    @property
    def numel(self) -> int:
        return self.a_rK.shape[1] * self.b_rN.shape[1]


def decompose(difference: torch.Tensor, inputs: Metric, outputs: Metric, rank: int) -> Spectrum:
    """The first `rank` components of fp32 [N, K]: in float64 on a CPU unless it is very large, in float32 on a GPU, and
    on its device."""
    rows, columns = difference.shape
    exact = difference if difference.is_cuda or difference.numel() > _DOUBLED else difference.double()
    factor_n, weight_n = _factor(outputs, exact)
    factor_k, weight_k = _factor(inputs, exact.T)
    weighted = _weighed(factor_n, _weighed(factor_k, exact.T).T)
    u, s, v = _svd(weighted, min(rank, rows, columns))
    balance = s.sqrt()
    return Spectrum(
        a_rK=_unweighed(factor_k, v * balance).T.float().contiguous(),
        b_rN=_unweighed(factor_n, u * balance).T.float().contiguous(),
        s_r=s.float(),
        weights=(weight_k, weight_n),
        factors=(_halved(factor_k), _halved(factor_n)),
    )


@dataclass(frozen=True, slots=True)
class Scaled:
    """A spectrum in units of its steps: what is stored are these values, rounded."""

    a_rK: torch.Tensor
    b_rN: torch.Tensor
    scale: float
    exponent_r: torch.Tensor

    def rounded(self) -> Coded | None:
        """Each value for itself; None where nothing is left."""
        (a_rK,), (b_rN,) = (feedback.rounded([side], [None]) for side in (self.a_rK, self.b_rN))
        return self.coded(a_rK, b_rN)

    def coded(self, a_rK: torch.Tensor, b_rN: torch.Tensor) -> Coded | None:
        """With these values, components of nothing left out."""
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


def quantise(spectra: Mapping[str, Callable[[], Spectrum]], delta: float) -> Iterator[tuple[str, Coded | None]]:
    """Round to the steps that `delta` gives; None where nothing is left. Spectra are fetched a few at a time."""
    group: dict[str, Spectrum] = {}
    for name, load in spectra.items():
        spectrum = load()
        if group and not _alike(next(iter(group.values())), spectrum, len(group)):
            yield from _rounded(group, delta)
            group = {}
        group[name] = spectrum
    yield from _rounded(group, delta)


def _alike(first: Spectrum, other: Spectrum, count: int) -> bool:
    """Whether it can be rounded together with `count` like the first."""
    most = _TOGETHER[other.a_rK.device.type]
    kinds = [(s.a_rK.shape[1], s.b_rN.shape[1], [f is None for f in s.factors]) for s in (first, other)]
    return kinds[0] == kinds[1] and (count + 1) * (other.a_rK.numel() + other.b_rN.numel()) <= most


def _rounded(spectra: Mapping[str, Spectrum], delta: float) -> Iterator[tuple[str, Coded | None]]:
    found = {name: scaled(spectrum, delta) for name, spectrum in spectra.items()}
    there = {name: one for name, one in found.items() if one is not None}
    sides = [
        feedback.rounded([(one.a_rK, one.b_rN)[i] for one in there.values()], [spectra[n].factors[i] for n in there])
        for i in (0, 1)
    ]
    coded = {name: one.coded(a, b) for (name, one), a, b in zip(there.items(), *sides, strict=True)}
    yield from ((name, coded.get(name)) for name in spectra)


def code_bits(coded: Coded | None) -> float:
    """Bits that storing takes, to within a fraction of a per cent; never much less than it really takes."""
    if coded is None:
        return 0.0
    return _bits((coded.a_rK, coded.b_rN), (coded.a_rK.shape[1], coded.b_rN.shape[1]))


def _bits(sides: tuple[torch.Tensor, torch.Tensor], lengths: tuple[int, int]) -> float:
    """`sides` may be samples of rows that are so long."""
    rank = sides[0].shape[0]
    flush = 32 * entropy.lanes_of(rank * sum(lengths))
    values = sum(
        entropy.best_classes(side)[1].sum().item() * length / side.shape[1]
        for side, length in zip(sides, lengths, strict=True)
    )
    return 1.002 * values + flush + _OVERHEAD_BITS * rank + _MATRIX_BITS


@dataclass(frozen=True, slots=True)
class _Sketch:
    """Every so many of a spectrum's columns, which tell what all of them would take."""

    sample: Spectrum
    lengths: tuple[int, int]

    @classmethod
    def of(cls, spectrum: Spectrum) -> _Sketch:
        a_rK, b_rN = (side[:, :: -(-side.shape[1] // _SAMPLED)].clone() for side in (spectrum.a_rK, spectrum.b_rN))
        lengths = spectrum.a_rK.shape[1], spectrum.b_rN.shape[1]
        return cls(Spectrum(a_rK, b_rN, spectrum.s_r, spectrum.weights), lengths)

    def bits(self, delta: float) -> float:
        found = scaled(self.sample, delta)
        coded = None if found is None else found.rounded()
        return 0.0 if coded is None else _bits((coded.a_rK, coded.b_rN), self.lengths)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a budget buys."""

    delta: float
    coding: Mapping[str, Coded | None]
    """On the CPU."""


def fit(spectra: Mapping[str, Callable[[], Spectrum]], budget_bits: float) -> Fit:
    """A delta whose code fits the budget and fills it to within a fraction of a per cent.

    Found on samples and corrected by what the whole takes: spectra are read a few times only.
    """
    sketches = [_Sketch.of(load()) for load in spectra.values()]
    wanted, delta = budget_bits, 0.0
    best: Fit | None = None
    for _ in range(_CORRECTIONS):
        delta = _bisected(sketches, wanted)
        spent, tried = _tried(spectra, delta)
        if spent <= budget_bits:
            best = tried if best is None or delta < best.delta else best
            if spent >= _FILLED * budget_bits:
                break
        if not spent:
            break
        wanted *= (1 + _FILLED) / 2 * budget_bits / spent
    while best is None:
        delta *= 1.005
        spent, tried = _tried(spectra, delta)
        best = tried if spent <= budget_bits else None
    return best


def unaided(spectra: Mapping[str, Callable[[], Spectrum]], budget_bits: float) -> float:
    """The delta whose values, each rounded for itself, take about so many bits."""
    return _bisected([_Sketch.of(load()) for load in spectra.values()], budget_bits)


def _tried(spectra: Mapping[str, Callable[[], Spectrum]], delta: float) -> tuple[float, Fit]:
    spent, coding = 0.0, {}
    for name, coded in quantise(spectra, delta):
        spent += code_bits(coded)
        coding[name] = None if coded is None else coded.to("cpu")
    return spent, Fit(delta, coding)


def kept(spectrum: Spectrum, delta: float) -> float:
    """About how much of a difference's weighted square is left: components lose their noise, or all that they are."""
    energy = spectrum.s_r.double().square()
    noise = (spectrum.a_rK.shape[1] + spectrum.b_rN.shape[1]) * delta**2 / 12
    return max(_LEAST_KEPT, 1 - (energy.clamp_max(noise).sum() / energy.sum().clamp_min(1e-300)).item())


def _bisected(sketches: list[_Sketch], budget_bits: float) -> float:
    high = max((sketch.sample.s_r[0].item() for sketch in sketches), default=0.0)
    low = high * 1e-7
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if _exceed(sketches, middle, budget_bits):
            low = middle
        else:
            high = middle
    return high


def _exceed(sketches: list[_Sketch], delta: float, budget_bits: float) -> bool:
    total = 0.0
    for sketch in sketches:
        total += sketch.bits(delta)
        if total > budget_bits:
            return True
    return False


def _halved(factor: torch.Tensor) -> torch.Tensor | None:
    """What rounding needs of it; None where it is a diagonal, or too large to keep."""
    if factor.ndim == 1 or len(factor) > _LARGEST:
        return None
    return (factor / factor.square().sum(1).mean().sqrt()).half()


def _factor(metric: Metric, matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(L, mean weight) of the side of `matrix`'s rows, with L L^T the moment, the matrix's own and the ridge included:
    lower triangular [M, M], or a diagonal [M]."""
    if metric.moment is None:
        moment = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    else:
        moment = metric.moment.to(matrix.device, matrix.dtype)
    if moment.ndim == 1:
        weight = moment + moment.mean().clamp_min(1e-30)  # rare rows may not be rare in the task: a full mean
        return weight.sqrt(), weight.mean().item()
    own = matrix @ matrix.T
    mean, own_mean = (m.diagonal().mean().clamp_min(1e-30) for m in (moment, own))
    # gradients may be so small that their squares are near the least float32
    moment = (moment / mean + own * (OWN / own_mean)) / (1 + OWN)
    moment.diagonal().add_(RIDGE)
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed.any():
        factor = torch.linalg.cholesky(moment.double()).to(matrix.dtype)
    return factor * mean.sqrt(), (mean * (1 + RIDGE)).item()


def _weighed(factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """L^T M"""
    return factor[:, None] * matrix if factor.ndim == 1 else factor.T @ matrix


def _unweighed(factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """L^-T M"""
    if factor.ndim == 1:
        return matrix / factor[:, None]
    return torch.linalg.solve_triangular(factor.T, matrix, upper=True)


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [N, r], s [r], V [K, r]) through the smaller Gram matrix, which is fast.

    V is orthonormal whatever the Gram matrix has lost, so that the product is exact, and small components merely mixed.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = _svd(matrix.T, rank)
        return u, s, v
    v = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    scaled = matrix @ v
    s = scaled.norm(dim=0)
    return scaled / s.clamp_min(torch.finfo(s.dtype).tiny), s, v
