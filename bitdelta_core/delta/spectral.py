"""Codec `spectral`: the difference as a product of two factors of small integers, entropy-coded.

D = sum_i scale_i b_i a_i^T over the components i of a weighted singular value decomposition. Each component has its own
step, so that its bits follow its weight (the idea of Delta-CoMe, arXiv 2406.08903, without its fixed classes), down to
components of which most values are zero and cost a fraction of a bit. `allocation.py` makes the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from bitdelta_core.delta import entropy
from bitdelta_core.delta.spec import TensorEntry
from bitdelta_core.errors import DeltaFormatError

STEPS_PER_OCTAVE = 8
"""Component scales are powers of 2^(1/8), times one scale of the matrix."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One matrix's difference, quantised; r components, none of them all zero."""

    a_rK: torch.Tensor
    """int8"""
    b_rN: torch.Tensor
    """int8, a component per row"""
    scale: float
    exponent_r: torch.Tensor
    """uint8"""

    @property
    def rank(self) -> int:
        return self.a_rK.shape[0]

    def matrix(self) -> torch.Tensor:
        """The difference, fp32 [N, K]."""
        scale_r = component_scales(torch.tensor([self.scale]), self.exponent_r)
        return (self.b_rN.float().T * scale_r) @ self.a_rK.float()

    def parts(self) -> dict[str, torch.Tensor]:
        """What is stored, but for `extra`."""
        classes = [entropy.best_classes(side)[0] for side in (self.a_rK, self.b_rN)]
        symbols = torch.cat([self.a_rK.flatten(), self.b_rN.flatten()]).numpy()
        code = entropy.encode(symbols, _per_symbol(torch.stack(classes), self.a_rK.shape[1], self.b_rN.shape[1]))
        return {
            "code": torch.from_numpy(np.frombuffer(code, np.uint8).copy()),
            "scale": torch.tensor([self.scale]),
            "exponent": self.exponent_r,
            "spread": torch.stack(classes),
        }


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's matrix, fp32 [N, K]."""
    a_rK, b_Rr, scale_r = factors(entry, parts)
    known = base[: entry.rows].float() + (b_Rr.float() * scale_r) @ a_rK.float()
    return torch.cat([known, parts["extra"].float()])


def factors(entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(int8 A [r, K], int8 B [R, r], fp32 [r]) with D = B diag(scale) A.

    Raises:
        DeltaFormatError: the code does not decode.
    """
    columns = entry.shape[1]
    try:
        values = entropy.decode(parts["code"].numpy(), _per_symbol(parts["spread"], columns, entry.rows))
    except entropy.BadCode as error:
        raise DeltaFormatError(f"{entry.part_name('code')}: {error}") from error
    split = entry.rank * columns
    a_rK = torch.from_numpy(values[:split]).view(entry.rank, columns)
    b_rR = torch.from_numpy(values[split:]).view(entry.rank, entry.rows)
    return a_rK, b_rR.T, component_scales(parts["scale"], parts["exponent"])


def component_scales(scale: torch.Tensor, exponent_r: torch.Tensor) -> torch.Tensor:
    """fp32 [r]: scale * 2^(-exponent / 8)."""
    return scale * torch.exp2(-exponent_r.float() / STEPS_PER_OCTAVE)


def _per_symbol(spread_2r: torch.Tensor, columns: int, rows: int) -> np.ndarray:
    return torch.cat([spread_2r[0].repeat_interleave(columns), spread_2r[1].repeat_interleave(rows)]).numpy()
