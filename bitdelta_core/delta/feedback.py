"""Rounding that makes up for its own errors: what rounding one value costs is taken back in those still to come.

With L L^T the second moment that weighs errors along a side, the error e of a factor's row costs |L^T e|^2. From the
last value to the first, each is rounded to where it cancels what the ones before left over in its own term of the sum:
GPTQ (arXiv 2210.17323) with its order of values reversed, or Babai's nearest plane. docs/log.md has what it gains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitdelta_core.delta import entropy

_BLOCK = 64


def rounded(values: Sequence[torch.Tensor], factors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """int8 [r, M] of each [r, M] in units of its steps; where there is no factor [M, M] each value for itself.

    Those with one have the same M, and are worked on together: a step is small.
    """
    if not values or any(factor is None for factor in factors):
        return [side.round().clamp(-entropy.LIMIT, entropy.LIMIT).to(torch.int8) for side in values]
    widest = max(map(len, values))
    padded = torch.stack([torch.nn.functional.pad(side.T, (0, widest - len(side))) for side in values])
    factor = torch.stack([f.float() for f in factors if f is not None])
    found = _rounded(padded, factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(1))
    return [q[:, : len(side)].T.contiguous() for q, side in zip(found.to(torch.int8), values, strict=True)]


def _rounded(values_GMr: torch.Tensor, shares_GMM: torch.Tensor) -> torch.Tensor:
    """shares [g, j, c]: what an error at j is worth in units of one at c, for j > c."""
    found, error = torch.empty_like(values_GMr), torch.zeros_like(values_GMr)
    for stop in range(values_GMr.shape[1], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        own = values_GMr[:, start:stop]
        wanted = own + shares_GMM[:, stop:, start:stop].mT @ error[:, stop:]
        within = shares_GMM[:, start:stop, start:stop].unsqueeze(-1)
        for i in reversed(range(stop - start)):
            q = found[:, start + i]
            torch.round(wanted[:, i], out=q)
            q.clamp_(-entropy.LIMIT, entropy.LIMIT)
            torch.sub(own[:, i], q, out=error[:, start + i])
            if i:
                wanted[:, :i].addcmul_(within[:, i, :i], error[:, start + i : start + i + 1])
    return found
