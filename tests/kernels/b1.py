"""What the interpreter lacks: `mma.m16n8k256.b1.b1 and.popc` and `mma.m16n8k32` of bytes, from the definition of their
fragments in the PTX ISA, and what `triton_compact.trade` says that it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mma(signs: np.ndarray, planes: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Fragments of every lane (group g, quarter q): A [.., 8, 4, 4 words], B [.., 8, 4, 2 words], C, D [.., 8, 4, 4].

    A's word c is row g + 8 (c % 2), columns from 32 (q + 4 (c // 2)) on; B's word c is column g, rows from
    32 (q + 4 c) on; C's element c is row g + 8 (c // 2), column 2 q + c % 2.
    """
    rows = np.zeros((*signs.shape[:-3], 16, 8), np.uint32)
    columns = np.zeros((*planes.shape[:-3], 8, 8), np.uint32)
    out = sums.copy()
    for q in range(4):
        for c in range(4):
            rows[..., 8 * (c % 2) : 8 * (c % 2) + 8, q + 4 * (c // 2)] = signs[..., q, c]
        for c in range(2):
            columns[..., q + 4 * c] = planes[..., q, c]
    counts = np.bitwise_count(rows[..., :, None, :] & columns[..., None, :, :]).sum(-1, dtype=np.int32)
    for q in range(4):
        for c in range(4):
            out[..., q, c] += counts[..., 8 * (c // 2) : 8 * (c // 2) + 8, 2 * q + c % 2]
    return out


def byte_mma(a: np.ndarray, b: np.ndarray, sums: np.ndarray, b_type: type[np.integer]) -> np.ndarray:
    """Fragments as in `mma`, of bytes: A is u8. A's byte i of word c is row g + 8 (c % 2), column 4 q + i +
    16 (c // 2); B's byte i of word c is column g, row 4 q + i + 16 c; C and D as there."""
    rows = np.zeros((*a.shape[:-3], 16, 32), np.int32)
    columns = np.zeros((*b.shape[:-3], 8, 32), np.int32)
    a_bytes = np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, 4)
    b_bytes = np.ascontiguousarray(b).view(b_type).reshape(*b.shape, 4)
    out = sums.copy()
    for q in range(4):
        for c in range(4):
            rows[..., 8 * (c % 2) : 8 * (c % 2) + 8, 4 * q + 16 * (c // 2) :][..., :4] = a_bytes[..., q, c, :]
        for c in range(2):
            columns[..., 4 * q + 16 * c :][..., :4] = b_bytes[..., q, c, :]
    products = rows @ np.swapaxes(columns, -1, -2)
    for q in range(4):
        for c in range(4):
            out[..., q, c] += products[..., 8 * (c // 2) : 8 * (c // 2) + 8, 2 * q + c % 2]
    return out


def trade(words: np.ndarray) -> np.ndarray:
    """Lanes (group g, quarter q) with a byte of planes 0 .. 15 each: [.., 8, 4, 4 words]. Word c of lane (g, q) gets
    the bytes of plane g + 8 (c // 2) of lanes 4 (c % 2) .. + 4 of the same quarter."""
    planes = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-3], 8, 4, 16)
    out = np.zeros((*words.shape, 4), np.uint8)
    for g in range(8):
        for c in range(4):
            first = 4 * (c % 2)
            out[..., g, :, c, :] = np.moveaxis(planes[..., first : first + 4, :, g + 8 * (c // 2)], -2, -1)
    return out.view(np.uint32)[..., 0]


def picked(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """Byte i of each result is byte number selector's digit i of the eight of a and b."""
    both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(a.shape, np.uint64)
    for i in range(4):
        out |= (both >> np.uint64(8 * (selector >> 4 * i & 7)) & np.uint64(255)) << np.uint64(8 * i)
    return out.astype(np.uint32)


class _Results:
    def __init__(self, found: list[np.ndarray], dtype: tl.dtype = tl.int32) -> None:
        self.found, self.dtype = found, dtype

    def get_result(self, i: int) -> interpreter.TensorHandle:
        return interpreter.TensorHandle(self.found[i], self.dtype)


def _inline_asm(self: Any, asm: str, operands: str, values: Any, dtypes: Any, pure: bool, pack: int) -> _Results:
    if asm.startswith("prmt.b32"):
        return _Results([picked(*(v.data for v in values[:2]), int(values[2].data.flat[0]))], tl.uint32)
    if "shfl.sync" in asm:
        return _traded(values, pure, pack)
    assert not pure
    assert pack == 4
    shape = values[0].data.shape
    signs, planes = (np.ascontiguousarray(v.data).view(np.uint32).reshape(-1, 8, 4, 4) for v in values[:2])
    sums = [np.ascontiguousarray(v.data).reshape(-1, 8, 4, 4) for v in values[2:]]
    pairs = planes[..., :2], planes[..., 2:]
    if "m16n8k32.row.col.s32.u8.u8.s32" in asm.partition(";")[0] and "m16n8k32.row.col.s32.u8.s8.s32" in asm:
        types = np.uint8, np.int8
        found = [byte_mma(signs, pair, s, t) for pair, s, t in zip(pairs, sums, types, strict=True)]
    else:
        assert asm.count("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc") == 2, f"not emulated: {asm}"
        found = [mma(signs, pair, s) for pair, s in zip(pairs, sums, strict=True)]
    return _Results([words.reshape(shape) for words in found])


def _traded(values: Any, pure: bool, pack: int) -> _Results:
    assert not pure
    assert pack == 4
    words = np.ascontiguousarray(values[0].data)
    return _Results([trade(words.view(np.uint32).reshape(-1, 8, 4, 4)).view(np.int32).reshape(words.shape)])


@contextmanager
def emulated() -> Iterator[None]:
    """On a device, or where the interpreter does it already, this changes nothing."""
    builder: Any = interpreter.InterpreterBuilder
    before = builder.create_inline_asm
    builder.create_inline_asm = _inline_asm
    try:
        yield
    finally:
        builder.create_inline_asm = before
