"""Kept values of a matrix whose other values are zero, in the order in which the binary tensor core takes them.

Neighbouring outputs share one mask (a mask block: 16 or 64 rows), which keeps equally many inputs of each group of
`group`. So a block is a dense matrix over its own V kept inputs: bits of its values are fragments as signs are
(`kernels.fragments`), and x is gathered once for all its rows. Nothing else of the matrix is stored.

The order of a block's kept inputs is free, so it is the one that costs a kernel least. Lane l of a warp gathers the
inputs 256 c + 32 j + l, j < 8: 32 lanes read neighbouring groups at a time. Its eight integers become a byte of every
plane, and lane 4g + q's byte is byte g % 4 of word q + 4 (g // 4) of the tile column: what each plane's lane wants
comes from lanes of the same q.

Shapes: N outputs, H = ceil(N / 16) tile rows, V kept inputs, C = ceil(V / 256) tile columns, M mask blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kernels.fragments import TILE_COLUMNS, TILE_ROWS, pack, tiles, unpack

MAX_GROUP = 256
"""A kept input is a byte: its place in its group."""
MAX_KEPT = 32
"""Most that are kept of a group: 32 kept inputs further on, another group begins."""
MAX_BITS = 4
MASK_ROWS = (16, 64)
_LOWEST = 0x0101010101010101


@dataclass(frozen=True, slots=True)
class Form:
    """How one target's kept values of one variant are stored. `code` is what the device table has of it."""

    bits: int
    """1 to MAX_BITS. A value q of 0 .. 2^bits - 1 stands for 2q - (2^bits - 1) of its output's half steps."""
    group: int
    """Inputs in a group: a power of two up to MAX_GROUP"""
    kept: int
    """Of each group: a power of two up to `group` and MAX_KEPT"""
    mask_rows: int
    """Outputs that share a mask: one of MASK_ROWS"""

    def __post_init__(self) -> None:
        assert 1 <= self.bits <= MAX_BITS
        assert self.mask_rows in MASK_ROWS
        assert 1 <= self.kept <= min(self.group, MAX_KEPT)
        assert self.group <= MAX_GROUP
        assert self.kept & (self.kept - 1) == 0
        assert self.group & (self.group - 1) == 0

    @property
    def code(self) -> int:
        """bits, log2 of tile rows in a mask block, log2 group, log2 kept: four bits each."""
        tall = (self.mask_rows // TILE_ROWS).bit_length() - 1
        return self.bits | tall << 4 | (self.group.bit_length() - 1) << 8 | (self.kept.bit_length() - 1) << 12

    @classmethod
    def of(cls, code: int) -> Form:
        return cls(code & 15, 1 << (code >> 8 & 15), 1 << (code >> 12 & 15), TILE_ROWS << (code >> 4 & 15))

    def values(self, inputs: int) -> int:
        """V: of one row, those of inputs that fill up the last group included."""
        return -(-inputs // self.group) * self.kept

    def columns(self, inputs: int) -> int:
        """C"""
        return tiles(1, self.values(inputs))[1]

    def blocks(self, outputs: int) -> int:
        """M"""
        return -(-outputs // self.mask_rows)

    def tile_shape(self, outputs: int, inputs: int) -> tuple[int, int, int, int, int]:
        """Of the values' fragments: int32"""
        return tiles(outputs, 1)[0], self.bits, self.columns(inputs), 32, 4

    def input_shape(self, outputs: int, inputs: int) -> tuple[int, int, int, int]:
        """Of the kept inputs: uint8, place in the group of kept input 256 c + 32 j + l at [., c, l, j]"""
        return self.blocks(outputs), self.columns(inputs), 32, 8


def pack_values(q_NV: torch.Tensor, form: Form, out_HPCLc: torch.Tensor) -> None:
    """Write the fragments of values 0 .. 2^bits - 1 (uint8, in the order of the kept inputs), all of them."""
    rows, wide = q_NV.shape[0], out_HPCLc.shape[2]
    padded = torch.nn.functional.pad(q_NV, (0, wide * TILE_COLUMNS - q_NV.shape[1]))
    eights = padded.view(-1, 8, 32).view(torch.int64)  # 32 j + lane, the bytes of eight lanes in a word
    packed = torch.empty((form.bits, out_HPCLc.shape[0], wide, 32, 4), dtype=torch.int32, device=q_NV.device)
    for p in range(form.bits):
        bits = eights >> p & _LOWEST
        of_lanes = bits[:, 0].clone()  # half, byte, q: see `_places`
        for j in range(1, 8):
            of_lanes |= bits[:, j] << j
        planes = of_lanes.view(torch.uint8).view(-1, 2, 4, 4).transpose(2, 3).reshape(1, rows, wide * 32)
        pack(planes, packed[p : p + 1])
    out_HPCLc.copy_(packed.transpose(0, 1))


def unpack_values(packed_HPCLc: torch.Tensor, rows: int, values: int) -> torch.Tensor:
    """The inverse of `pack_values`: uint8 [rows, values]."""
    wide = packed_HPCLc.shape[2]
    found = torch.zeros((rows, wide, TILE_COLUMNS), dtype=torch.uint8, device=packed_HPCLc.device)
    for p in range(packed_HPCLc.shape[1]):
        bytes_Nk = unpack(packed_HPCLc[:, p].contiguous()[None], rows, wide * TILE_COLUMNS)[0]
        bits = bytes_Nk[..., None] >> torch.arange(8, device=found.device, dtype=torch.uint8) & 1
        found[..., _places(found.device)] += bits.view(rows, wide, TILE_COLUMNS) << p
    return found.view(rows, -1)[:, :values]


def pack_inputs(columns_MV: torch.Tensor, form: Form, out_MCLj: torch.Tensor) -> None:
    """Write the place in its group of every kept input; zeros beyond the last, whose groups do not exist."""
    blocks, wide = out_MCLj.shape[:2]
    places = (columns_MV & (form.group - 1)).to(torch.uint8)
    padded = torch.nn.functional.pad(places, (0, wide * TILE_COLUMNS - places.shape[1]))
    out_MCLj.copy_(padded.view(blocks, wide, 8, 32).transpose(2, 3))


def unpack_inputs(packed_MCLj: torch.Tensor, form: Form, values: int) -> torch.Tensor:
    """The inverse of `pack_inputs`: int64 [M, values]."""
    places = packed_MCLj.transpose(2, 3).reshape(packed_MCLj.shape[0], -1)[:, :values].long()
    return places + torch.arange(values, device=places.device) // form.kept * form.group


@lru_cache(maxsize=4)
def _places(device: torch.device) -> torch.Tensor:
    """Which of 256 kept inputs stands in each column of a tile."""
    half, q, byte, j = torch.meshgrid(*(torch.arange(n, device=device) for n in (2, 4, 4, 8)), indexing="ij")
    return (32 * j + 4 * (4 * half + byte) + q).flatten()
