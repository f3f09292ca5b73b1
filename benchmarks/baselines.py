"""Published ways to store a fine-tune, to compare with: baselines of benchmarks/fidelity.py, no codecs of the product.

Each turns a matrix into the parts that a file would hold, whose sizes add up to the bytes that are counted, and makes
the difference again from the parts alone (and the base). `bits` is the budget, per weight of the matrix, all parts
included. Every matrix gets the same budget, as in the papers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from baselines_grid import GROUP, Codes, bits_per_value, gptq, gptq_columns, round_to_nearest

Parts = Mapping[str, torch.Tensor | Codes]
_SKIP = 255
"""Magnitude: a byte that moves on by so many weights and keeps none."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of base and fine-tune, fp32 [N, K], with what several baselines need of it."""

    name: str
    base: torch.Tensor
    fine: torch.Tensor
    moment: torch.Tensor | None = None
    """Second moment of the inputs [K, K] on calibration text, for GPTQ."""

    @cached_property
    def difference(self) -> torch.Tensor:
        return self.fine - self.base

    @cached_property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(b [N, r], a [r, K]): the singular vectors, each times the root of its singular value, in falling order."""
        u, s, v = _svd(self.difference.double())
        return (u * s.sqrt()).float(), (v * s.sqrt()).T.contiguous().float()

    @cached_property
    def _calibrated(self) -> dict[tuple[int, ...], Codes]:
        return {}

    def calibrated(self, bits_r: torch.Tensor) -> Codes:
        """GPTQ of the first components of a. Rows do not depend on each other: those of an earlier call are reused."""
        wanted = tuple(bits_r.tolist())
        assert self.moment is not None, f"{self.name}: GPTQ needs calibration"
        for known, codes in self._calibrated.items():
            if known[: len(wanted)] == wanted:
                return codes.first(len(wanted))
        self._calibrated[wanted] = gptq(self.factors[1][: len(wanted)], self.moment, bits_r)
        return self._calibrated[wanted]


class Baseline(Protocol):
    """A way to store a matrix."""

    def encode(self, matrix: Matrix, seed: int) -> Parts: ...
    def difference(self, parts: Parts, matrix: Matrix) -> torch.Tensor:
        """fp32 [N, K]: what the parts say is to be added to the base."""
        ...


def nbytes(parts: Parts) -> int:
    """Of all parts."""
    return sum(part.nbytes for part in parts.values())


@dataclass(frozen=True, slots=True)
class LowRank:
    """Truncated SVD, both factors in 16 bits."""

    bits: float

    def encode(self, matrix: Matrix, seed: int) -> Parts:
        b, a = matrix.factors
        rank = max(1, int(self.bits * matrix.base.numel() / (16 * sum(matrix.base.shape))))
        return {"a": a[:rank].half(), "b": b[:, :rank].half()}

    def difference(self, parts: Parts, matrix: Matrix) -> torch.Tensor:
        return _tensor(parts, "b").float() @ _tensor(parts, "a").float()


@dataclass(frozen=True, slots=True)
class DeltaCome:
    """SVD with 8, 3 and 2 bits by singular value, the rest dropped (Delta-CoMe, arXiv 2406.08903).

    Of a 4096 wide matrix the paper keeps 2 components in 8 bits, 32 in 3 and about 970 in 2. Here 8 and 3 bits have
    the same share of a matrix's full rank, rounded up, and the budget says how many have 2. Groups of 128 values.
    """

    bits: float
    calibrated: bool
    """GPTQ on the right factor, then on the left one, as in the paper but without act-order; else round-to-nearest."""

    def encode(self, matrix: Matrix, seed: int) -> Parts:
        b, a = matrix.factors
        bits_r = self._bits(*matrix.base.shape).to(a.device)
        b, a = b[:, : len(bits_r)], a[: len(bits_r)]
        if not self.calibrated:
            return {"a": round_to_nearest(a, bits_r), "b": round_to_nearest(b.T.contiguous(), bits_r)}
        assert matrix.moment is not None, f"{matrix.name}: GPTQ needs calibration"
        right = matrix.calibrated(bits_r)
        stored = right.values()
        return {"a": right, "b": gptq_columns(b, stored @ matrix.moment @ stored.T, bits_r)}

    def difference(self, parts: Parts, matrix: Matrix) -> torch.Tensor:
        return _codes(parts, "b").values().T @ _codes(parts, "a").values()

    def _bits(self, rows: int, columns: int) -> torch.Tensor:
        full = min(rows, columns)
        budget = self.bits * rows * columns
        found: list[int] = []
        for bits, most in ((8, math.ceil(full * 2 / 4096)), (3, math.ceil(full * 32 / 4096)), (2, full)):
            cost = sum(length * bits_per_value(bits, length) for length in (rows, columns))
            count = max(not found, min(most, full - len(found), int(budget / cost)))
            found += [bits] * count
            budget -= count * cost
        return torch.tensor(found)


@dataclass(frozen=True, slots=True)
class Dare:
    """Random drop and rescale (DARE, arXiv 2311.03099), kept values in 16 bits.

    The mask comes from a seed that is stored; the paper, which counts no indices, can have them for nothing only so.
    """

    bits: float

    def encode(self, matrix: Matrix, seed: int) -> Parts:
        own = torch.tensor([zlib.crc32(f"{seed} {matrix.name}".encode())])
        return {"value": (matrix.difference[self._kept(own, matrix)] / self._keep).half(), "seed": own}

    def difference(self, parts: Parts, matrix: Matrix) -> torch.Tensor:
        found = torch.zeros_like(matrix.base)
        found[self._kept(_tensor(parts, "seed"), matrix)] = _tensor(parts, "value").float()
        return found

    @property
    def _keep(self) -> float:
        return self.bits / 16

    def _kept(self, seed: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(seed))
        return (torch.rand(matrix.base.shape, generator=generator) < self._keep).to(matrix.base.device)


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The largest differences in 16 bits, each with a byte for the distance from the one before it, row after row.

    A byte of 255 moves on by 255 and keeps nothing. At these densities that is smaller than 16-bit columns or a bitmap.
    """

    bits: float

    def encode(self, matrix: Matrix, seed: int) -> Parts:
        flat = matrix.difference.flatten()
        order = flat.abs().topk(max(1, int(self.bits * flat.numel() / 24))).indices
        budget = self.bits * flat.numel() / 8
        count = len(order)
        while True:
            kept = order[:count].sort().values
            steps = _steps(kept)
            size = 2 * count + len(steps)
            if size <= budget or count == 1:
                return {"value": flat[kept].half(), "step": steps}
            count = max(1, min(count - 1, int(count * budget / size)))

    def difference(self, parts: Parts, matrix: Matrix) -> torch.Tensor:
        steps = _tensor(parts, "step").long()
        ends = (steps + (steps < _SKIP)).cumsum(0)
        found = torch.zeros_like(matrix.base).flatten()
        found[ends[steps < _SKIP] - 1] = _tensor(parts, "value").float()
        return found.view_as(matrix.base)


@dataclass(frozen=True, slots=True)
class Whole:
    """The fine-tune's own matrix, rounded to the nearest of 2^bits levels, without regard to the base."""

    bits: int
    group: int | None = GROUP
    """None: one scale for each output."""

    def encode(self, matrix: Matrix, seed: int) -> Parts:
        bits = torch.full((matrix.fine.shape[0],), self.bits, device=matrix.fine.device)
        return {"code": round_to_nearest(matrix.fine, bits, self.group or matrix.fine.shape[1])}

    def difference(self, parts: Parts, matrix: Matrix) -> torch.Tensor:
        return _codes(parts, "code").values() - matrix.base


def _steps(kept: torch.Tensor) -> torch.Tensor:
    """uint8: the distances between ascending flat indices, as `Magnitude` stores them."""
    gaps = torch.diff(kept, prepend=kept.new_tensor([-1])) - 1
    ends = (gaps // _SKIP + 1).cumsum(0)
    steps = torch.full((int(ends[-1]),), _SKIP, dtype=torch.uint8, device=kept.device)
    steps[ends - 1] = (gaps % _SKIP).to(torch.uint8)
    return steps


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [N, r], s [r], V [K, r]) of a float64 matrix, through the smaller Gram matrix: quick on every device."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = _svd(matrix.T)
        return u, s, v
    v = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)
    scaled = matrix @ v
    s = scaled.norm(dim=0)
    return scaled / s.clamp_min(1e-300), s, v


def _tensor(parts: Parts, name: str) -> torch.Tensor:
    part = parts[name]
    assert isinstance(part, torch.Tensor), f"{name} holds codes"
    return part


def _codes(parts: Parts, name: str) -> Codes:
    part = parts[name]
    assert isinstance(part, Codes), f"{name} holds no codes"
    return part
