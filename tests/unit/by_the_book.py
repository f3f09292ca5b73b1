"""Parts of docs/delta-format.md in plain integers, without torch and without our code."""

from __future__ import annotations


def mix(x: int) -> int:
    x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
    x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
    return x ^ x >> 16


def kept_columns(row: int, columns: int, group: int, alpha: int, mask_rows: int, seed: int) -> list[int]:
    """deltadq: the inputs that a row keeps, in the order of its values; those of the padding are `columns` or more."""
    found = []
    for i in range(-(-columns // group)):
        key = mix((row // mask_rows * 0x9E3779B9) % 2**32 ^ seed)
        key = mix((key + i * 0x85EBCA6B) % 2**32)
        for j in range(group // alpha):
            at = j
            for turn in range(3):
                own = mix((key + turn * 0x9E3779B9) % 2**32)
                at = (at * (own | 1) + (own >> 16)) % group
                at ^= at >> max(1, group.bit_length() // 2)
            found.append(i * group + at)
    return found
