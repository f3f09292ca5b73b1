"""Sign bits in the order in which tensor cores take them.

`mma.m16n8k256.b1` wants of a 16 x 256 tile of bits, in lane 4g + q (g < 8, q < 4), four 32-bit words: row
g + 8 (c % 2), columns from 32 (q + 4 (c // 2)) on, for c = 0..3. Stored tile after tile as int32 [32 lanes][4 words], a
warp reads a tile with one 16-byte load per lane and multiplies it without touching a bit. N is padded to 16 and K to
256 with zero bits; a zero bit stands for -1, which is harmless only because inputs are padded with zeros there.

Shapes: P planes, N rows, K columns, H = ceil(N / 16) tile rows, B = ceil(K / 256) tile columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch

TILE_ROWS, TILE_COLUMNS = 16, 256
WORDS = TILE_ROWS * TILE_COLUMNS // 32
"""int32 words of one tile."""


def tiles(n: int, k: int) -> tuple[int, int]:
    """(H, B) of an n x k matrix."""
    return -(-n // TILE_ROWS), -(-k // TILE_COLUMNS)


def pack(sign_PNk: torch.Tensor, out_PHBLc: torch.Tensor) -> None:
    """Reorder sign bytes (uint8 [P, N, ceil(K / 8)], LSB first along K, as `SignDelta` has them) into fragments.

    Args:
        out_PHBLc: int32 [P, H, B, 32, 4], written whole; each plane contiguous.
    """
    planes, rows, nbytes = sign_PNk.shape
    high, wide = out_PHBLc.shape[1:3]
    if (rows, nbytes) != (high * TILE_ROWS, wide * TILE_COLUMNS // 8):
        padded = sign_PNk.new_zeros((planes, high * TILE_ROWS, wide * TILE_COLUMNS // 8))
        padded[:, :rows, :nbytes] = sign_PNk
        sign_PNk = padded
    order = _order(wide, sign_PNk.device).expand(high, -1)
    for sign_Nk, out_HBLc in zip(sign_PNk, out_PHBLc, strict=True):
        torch.gather(_words(sign_Nk).view(high, -1), 1, order, out=out_HBLc.view(high, -1))


def _words(sign_Nk: torch.Tensor) -> torch.Tensor:
    """As int32; bytes that lie askew in a mapped file are copied first."""
    return (sign_Nk if sign_Nk.data_ptr() % 4 == 0 else sign_Nk.clone()).contiguous().view(torch.int32)


@lru_cache(maxsize=64)
def _order(wide: int, device: torch.device) -> torch.Tensor:
    """Which word of 16 row-major rows of `wide` tiles each fragment word is. A gather of whole rows of tiles runs at
    several GB/s on one core, ten times faster than a permuted copy."""
    words = torch.arange(TILE_ROWS * wide * 8, device=device).view(2, 8, wide, 2, 4)  # half, g, B, khalf, q
    return words.permute(2, 1, 4, 3, 0).reshape(-1)


def unpack(packed_PHBLc: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [P, n, ceil(k / 8)]."""
    planes, high, wide = packed_PHBLc.shape[:3]
    words = packed_PHBLc.view(planes, high, wide, 8, 4, 2, 2).permute(0, 1, 6, 3, 2, 5, 4)
    return words.reshape(planes, high * TILE_ROWS, wide * 8).view(torch.uint8)[:, :n, : -(-k // 8)]
