"""What the interpreter lacks: `mma.m16n8k256.b1.b1 and.popc`, from the definition of its fragments in the PTX ISA."""

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


class _Results:
    def __init__(self, found: list[np.ndarray]) -> None:
        self.found = found

    def get_result(self, i: int) -> interpreter.TensorHandle:
        return interpreter.TensorHandle(self.found[i], tl.int32)


def _inline_asm(self: Any, asm: str, operands: str, values: Any, dtypes: Any, pure: bool, pack: int) -> _Results:
    assert asm.count("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc") == 2, f"not emulated: {asm}"
    assert not pure
    assert pack == 4
    shape = values[0].data.shape
    signs, planes = (np.ascontiguousarray(v.data).view(np.uint32).reshape(-1, 8, 4, 4) for v in values[:2])
    sums = [np.ascontiguousarray(v.data).reshape(-1, 8, 4, 4) for v in values[2:]]
    return _Results([mma(signs, planes[..., 2 * i : 2 * i + 2], s).reshape(shape) for i, s in enumerate(sums)])


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
