"""Codec `deltadq`: group-wise dropout with low-bit values (DeltaDQ, arXiv 2410.08666, sections 3.2 and 3.3).

Of every `group` inputs exactly group / alpha are kept, their values times alpha in `bits` bits; the rest is zero. Which
ones is drawn from a counter-based generator, so a mask costs no bytes, a row or a group can be remade alone, and a
kernel can do it: the j-th kept input of a group is `permute(key, j)` with a keyed bijection of 0 .. group - 1.
Rows of one mask block (1, 16 or 64 outputs) share their masks, so that a kernel gathers inputs once for all of them.

The paper splits a value's bits in m parts of their own scale-free codes. Packed, that is the code's high bits (which
part) and low bits (the value in it), the same bits: its ratios count the low ones only, ours all of them.

Not covered: masks that look at the values, other than by choosing the group size (`dropout.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitdelta_core.delta.bitdelta import normalised
from bitdelta_core.delta.quant import pack, unpack
from bitdelta_core.delta.spec import TensorEntry

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_ROUNDS = 3
_GRID = 24
"""Candidate scales for two bits and more, as fractions of the largest value's."""


def encode(base: torch.Tensor, fine: torch.Tensor, entry: TensorEntry) -> tuple[TensorEntry, dict[str, torch.Tensor]]:
    """Code fine - base, both [N, K]."""
    columns_NV = _columns_of_rows(entry)
    padded_NK = torch.nn.functional.pad(fine.float() - base.float(), (0, entry.padded_columns - entry.shape[1]))
    kept_NV = padded_NK.gather(1, columns_NV) * entry.alpha
    scale_N1 = _best_scale(kept_NV, entry)
    parts: dict[str, torch.Tensor] = {}
    if entry.scale_layout == "row":
        mean, row_N = normalised(scale_N1[:, 0])
        parts |= {"scale": mean.reshape(1), "row": row_N}
    else:
        parts["scale"] = scale_N1[:1, 0]
    levels = _levels(kept_NV, _scales(parts, entry).unsqueeze(1), entry.bits)
    return entry, {"code": pack((levels + 2**entry.bits - 1).to(torch.uint8) >> 1, entry.bits), **parts}


def decode(entry: TensorEntry, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The fine-tune's matrix, fp32 [N, K]."""
    halves_NK = expand(entry, parts["code"]).float()
    return base.float() + halves_NK * half_scales(entry, parts).unsqueeze(1)


def expand(entry: TensorEntry, code: torch.Tensor) -> torch.Tensor:
    """The difference as int8 [N, K] in units of `half_scales`: odd numbers where a value is kept, 0 elsewhere."""
    columns_NV = _columns_of_rows(entry)
    values = 2 * unpack(code, entry.bits, entry.kept).to(torch.int8) - (2**entry.bits - 1)
    wide = torch.zeros(entry.shape[0], entry.padded_columns, dtype=torch.int8)
    return wide.scatter_(1, columns_NV, values)[:, : entry.shape[1]]


def half_scales(entry: TensorEntry, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """fp32 [N]: half of the distance between two levels."""
    return _scales(parts, entry) / 2


def kept_columns(entry: TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """int64 [stop - start, V]: which inputs the mask blocks start:stop keep, in the order of the stored values.

    A column at or beyond K belongs to the padding of the last group: its value is stored and means nothing.
    """
    stop = -(-entry.shape[0] // entry.mask_rows) if stop is None else stop
    groups = entry.padded_columns // entry.group
    key = _mix(torch.arange(start, stop) * _GOLDEN & _MASK ^ entry.seed).unsqueeze(1)
    key = _mix((key + torch.arange(groups) * 0x85EBCA6B) & _MASK).unsqueeze(2)
    inside = permute(key, torch.arange(entry.group // entry.alpha), entry.group)
    return (inside + entry.group * torch.arange(groups).unsqueeze(1)).flatten(1)


def permute(key: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """A keyed bijection of 0 .. size - 1 (a power of two): rounds of an odd multiple, an offset and a folding shift."""
    shift = max(1, size.bit_length() // 2)
    for turn in range(_ROUNDS):
        own = _mix((key + turn * _GOLDEN) & _MASK)
        index = (index * (own | 1) + (own >> 16)) & (size - 1)
        index = index ^ (index >> shift)
    return index


def _columns_of_rows(entry: TensorEntry) -> torch.Tensor:
    return kept_columns(entry).repeat_interleave(entry.mask_rows, 0)[: entry.shape[0]]


def _scales(parts: Mapping[str, torch.Tensor], entry: TensorEntry) -> torch.Tensor:
    """fp32 [N]: the distance between two levels."""
    rows = parts["row"].float() if entry.scale_layout == "row" else torch.ones(entry.shape[0])
    return parts["scale"] * rows


def _best_scale(kept_NV: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """[N, 1], or [1, 1] for one scale in all: the one of least squared error."""
    values = kept_NV if entry.scale_layout == "row" else kept_NV.reshape(1, -1)
    if entry.bits == 1:
        return 2 * values.abs().mean(1, keepdim=True)
    top = values.abs().amax(1, keepdim=True) / (2 ** (entry.bits - 1) - 0.5)
    best, least = top, torch.full_like(top, torch.inf)
    for factor in torch.linspace(0.15, 1.0, _GRID):
        scale = top * factor
        error = (values - _levels(values, scale, entry.bits) * scale / 2).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _levels(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest odd numbers between -(2^bits - 1) and 2^bits - 1, in units of half the scale."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    top = 2 ** (bits - 1)
    return (values * inverse).floor_().clamp_(-top, top - 1) * 2 + 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3 on 32 bits, in int64."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)
