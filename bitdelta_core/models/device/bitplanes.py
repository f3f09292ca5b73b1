"""Packed values cut into planes: bit p of every value into plane p.

Eight values of `bits` bits are a small bit matrix; transposing it exchanges pairs of the bits of each bit's own index
("delta swaps", Knuth, The Art of Computer Programming 4A, section 7.1.3), 64 bits at a time, all planes at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional


def bit_planes(q_Nk: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """The planes of unsigned `bits`-wide values (2, 4 or 8), LSB first along K: uint8 [bits, N, ceil(inputs / 8)]."""
    words = functional.pad(q_Nk, (0, -q_Nk.shape[1] % 8)).contiguous().view(torch.int64)
    if q_Nk.shape[1] % 8 == 0:
        words = words.clone()  # padding has copied it otherwise
    swaps, order = _plan(bits)
    moved = torch.empty_like(words)
    for shift, mask in swaps:
        torch.bitwise_right_shift(words, shift, out=moved)
        moved.bitwise_xor_(words).bitwise_and_(mask)
        words.bitwise_xor_(moved)
        words.bitwise_xor_(moved.bitwise_left_shift_(shift))
    groups = words.view(torch.uint8).unflatten(1, (-1, bits))[:, : -(-inputs // 8)]
    return torch.stack([groups[..., place] for place in order])


@lru_cache(maxsize=8)
def _plan(bits: int) -> tuple[list[tuple[int, int]], list[int]]:
    """(shift, mask) of each swap, and which byte of a group then holds each plane.

    A bit's index in its group, lowest digit first, is (plane digits, value digits); it becomes (value digits, plane
    digits).
    """
    depth = bits.bit_length() - 1
    digits = [*range(depth), *(f"v{i}" for i in range(3))]
    swaps = []
    for low in range(3):
        high = digits.index(f"v{low}")
        digits[low], digits[high] = digits[high], digits[low]
        swaps.append(_swap(low, high))
    order = [sum((plane >> int(d) & 1) << i for i, d in enumerate(digits[3:])) for plane in range(bits)]
    return swaps, order


def _swap(low: int, high: int) -> tuple[int, int]:
    """Exchanges two digits of every bit's index: bits with 1 in `low` and 0 in `high` move up by `shift`."""
    mask = sum(1 << n for n in range(64) if n >> low & 1 and not n >> high & 1)
    return (1 << high) - (1 << low), mask - (1 << 64) if mask >> 63 else mask
