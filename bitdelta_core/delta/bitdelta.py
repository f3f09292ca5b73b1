"""Codec `bitdelta`: signs and scales of the difference, plane after plane (BitDelta, arXiv 2402.10193, section 3.1).

A bit is set where the (residual) difference is >= 0, so a zero counts as +1, as in the authors' code.
Scales are the L2-optimal ones for the signs: with S = sign(D), ||D - A*S|| = || |D| - A || for any A >= 0, so one scale
is mean |D|, a row's is the mean of its |D|, and row times column is the best rank-1 approximation of |D|.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitdelta_core.delta.spec import ScaleLayout, TensorEntry

Parts = dict[str, torch.Tensor]
_RANK1_STEPS = 12
_SIGNS = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).float() * 2 - 1
"""[256, 8]: what each byte unpacks to. Looking bytes up takes a third of the time of testing bits."""


def encode(base: torch.Tensor, fine: torch.Tensor, entry: TensorEntry) -> tuple[TensorEntry, Parts]:
    """Code fine - base (both [N, K]) in `entry.planes` planes; each codes what those before it left over."""
    residual = fine.float() - base.float()
    planes = []
    for _ in range(entry.planes):
        plane = _encode_plane(residual, entry.scale_layout)
        planes.append(plane)
        residual -= _decode_plane(plane, residual.shape[1])
    return entry, {part: torch.stack([plane[part] for plane in planes]) for part in entry.parts()}


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's matrix, fp32 [N, K]."""
    fine = base.float().clone()
    for p in range(entry.planes):
        fine += _decode_plane({part: tensor[p] for part, tensor in parts.items()}, entry.shape[1])
    return fine


def pack(bits: torch.Tensor) -> torch.Tensor:
    """bool [..., K] -> uint8 [..., ceil(K / 8)], LSB first, padded with zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    grouped = padded.view(*padded.shape[:-1], -1, 8)
    return (grouped << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 [..., ceil(K / 8)] -> float32 +-1 [..., K]."""
    signs = _SIGNS.to(packed.device).index_select(0, packed.reshape(-1).int())
    return signs.view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :k]


def _encode_plane(residual: torch.Tensor, layout: ScaleLayout) -> Parts:
    magnitude = residual.abs()
    plane = {"sign": pack(residual >= 0)}
    match layout:
        case "tensor":
            plane["scale"] = magnitude.mean()
        case "row":
            plane["scale"], plane["row"] = normalised(magnitude.mean(1))
        case "row_col":
            row, col = _rank1(magnitude)
            row_mean, plane["row"] = normalised(row)
            col_mean, plane["col"] = normalised(col)
            plane["scale"] = row_mean * col_mean
    return plane


def normalised(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, fp16 factors of mean 1), so that halves keep their precision whatever the size of the difference."""
    mean = scale.mean()
    return mean, (scale / mean.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(65504).to(torch.float16)


def _rank1(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column factors that minimise || |D| - row col^T ||, each the closed form given the other, in turn."""
    col = torch.ones(magnitude.shape[1])
    row = magnitude.mean(1)
    for _ in range(_RANK1_STEPS):
        col = (row @ magnitude) / (row @ row).clamp_min(torch.finfo(torch.float32).tiny)
        row = (magnitude @ col) / (col @ col).clamp_min(torch.finfo(torch.float32).tiny)
    return row, col


def _decode_plane(plane: Mapping[str, torch.Tensor], k: int) -> torch.Tensor:
    difference = unpack(plane["sign"], k) * plane["scale"]
    if "row" in plane:
        difference *= plane["row"].float().unsqueeze(1)
    if "col" in plane:
        difference *= plane["col"].float()
    return difference
