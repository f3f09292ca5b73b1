"""Codec `quant`: the difference in 2, 4 or 8 bits with one scale per row; rows beyond the base's are stored whole.

The scale of each row is the best of a grid under squared error, then refitted to the codes in closed form. Codes are
q - 2^(bits-1), that is -2, -1, 0, 1 for two bits; a negative scale turns the longer side to where the row needs it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitdelta_core.delta.spec import TensorEntry

_CHUNK = 1 << 12
_GRID = {2: 12, 4: 16, 8: 6}
"""Candidate scales, from that of the whole range down to _NARROWEST of it; 8 bits hardly gains from clipping."""
_NARROWEST = {2: 0.2, 4: 0.35, 8: 0.8}


def encode(base: torch.Tensor, fine: torch.Tensor, entry: TensorEntry) -> tuple[TensorEntry, dict[str, torch.Tensor]]:
    """Code the first `entry.rows` rows of fine - base; keep the others of `fine` [N', K] whole."""
    assert entry.rows == min(base.shape[0], fine.shape[0]), f"{entry.name}: {entry.rows} rows planned"
    codes, scales = [], []
    for start in range(0, entry.rows, _CHUNK):
        rows = slice(start, min(start + _CHUNK, entry.rows))
        q, scale = _encode_rows(fine[rows].float() - base[rows].float(), entry.bits)
        codes.append(q)
        scales.append(scale)
    empty = torch.empty(0, -(-entry.shape[1] * entry.bits // 8), dtype=torch.uint8)
    q = torch.cat([empty, *codes])
    return entry, {"q": q, "scale": torch.cat([torch.empty(0), *scales]), "extra": fine[entry.rows :].to(entry.dtype)}


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's matrix, fp32 [N', K]."""
    levels = unpack(parts["q"], entry.bits, entry.shape[1]).float() - 2 ** (entry.bits - 1)
    known = base[: entry.rows].float() + levels * parts["scale"].unsqueeze(1)
    return torch.cat([known, parts["extra"].float()])


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [N, K] -> uint8 [N, ceil(K * bits / 8)], the first code in the lowest bits, padded with zeros."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(q, (0, -q.shape[1] % per_byte)).view(q.shape[0], -1, per_byte)
    return (padded << (bits * torch.arange(per_byte)).to(torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes [N, K]."""
    shifts = (bits * torch.arange(8 // bits)).to(torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[:, :k]


def _encode_rows(difference: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed codes, fp32 scale per row) of fp32 [n, K]."""
    top = 2 ** (bits - 1)
    widest = difference.abs().amax(1, keepdim=True) / (top - 1)
    best_error = torch.full_like(widest, float("inf"))
    best = torch.zeros_like(widest)
    for factor in torch.linspace(_NARROWEST[bits], 1.0, _GRID[bits]):
        for sign in (1.0, -1.0):
            scale = sign * factor * widest
            levels = _levels(difference, scale, top)
            error = (difference - levels * scale).square().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, scale, best)
    levels = _levels(difference, best, top)
    energy = levels.square().sum(1)
    refitted = (levels * difference).sum(1) / energy.clamp_min(1)
    return pack((levels + top).to(torch.uint8), bits), torch.where(energy > 0, refitted, 0.0)


def _levels(difference: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest codes in -top .. top - 1 (0 where the scale is 0)."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (difference * inverse).round_().clamp_(-top, top - 1)
