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


def coded_integers(code: bytes, classes: list[int], decays: list[int]) -> list[int]:
    """spectral: the values in `code`, value i of class classes[i]."""
    tables = {c: _table(decays[c]) for c in set(classes)}
    lanes = 1
    while 2 * lanes <= min(4096, max(1, len(classes) // 4096)):
        lanes *= 2
    states = [int.from_bytes(code[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    at, values = 4 * lanes, []
    for first in range(0, len(classes), lanes):
        own = classes[first : first + lanes]
        for lane, c in enumerate(own):
            x = states[lane]
            value, start, count = next(row for row in tables[c] if row[1] <= x % 2**16 < row[1] + row[2])
            values.append(value)
            states[lane] = count * (x // 2**16) + x % 2**16 - start
        for lane in range(len(own)):
            if states[lane] < 2**16:
                states[lane] = 2**16 * states[lane] + int.from_bytes(code[at : at + 2], "little")
                at += 2
    assert at == len(code)
    assert set(states) == {2**16}
    return values


def _table(decay: int) -> list[tuple[int, int, int]]:
    """(value, start, frequency)"""
    weights, ratio = [2**32], decay
    while len(weights) <= 127 and weights[-1] * ratio // 2**32 >= 64:
        weights.append(weights[-1] * ratio // 2**32)
        ratio = ratio * (decay * decay // 2**32) // 2**32
    total = weights[0] + 2 * sum(weights[1:])
    counts = [max(1, 2**16 * w // total) for w in weights]
    counts[0] = 2**16 - 2 * sum(counts[1:])
    rows, start = [], 0
    for value in range(1 - len(weights), len(weights)):
        rows.append((value, start, counts[abs(value)]))
        start += counts[abs(value)]
    return rows
