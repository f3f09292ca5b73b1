"""Reading one entry's parts of one target through the device table, for the kernels beside decode-sized sign planes.

TABLE points at the target's row of entry 0; `table_stride` is the distance between entries (`table_arguments`).
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import configs
from kernels.device import UNIT, DeviceDeltas, Field, Target

SIGN = tl.constexpr(int(Field.SIGN))
SCALE = tl.constexpr(int(Field.SCALE))
PLANES = tl.constexpr(int(Field.PLANES))
COL = tl.constexpr(int(Field.COL))
ZERO = tl.constexpr(int(Field.ZERO))
LORA_A = tl.constexpr(int(Field.LORA_A))
LORA_B = tl.constexpr(int(Field.LORA_B))
RANK = tl.constexpr(int(Field.RANK))
DENSE = tl.constexpr(int(Field.DENSE))
ROW_INDEX = tl.constexpr(int(Field.ROW_INDEX))
ROW_VALUE = tl.constexpr(int(Field.ROW_VALUE))
ROWS = tl.constexpr(int(Field.ROWS))
OUTPUTS = tl.constexpr(int(Field.OUTPUTS))
KEPT = tl.constexpr(int(Field.KEPT))
INPUTS = tl.constexpr(int(Field.INPUTS))
FORM = tl.constexpr(int(Field.FORM))
_UNIT_BITS = tl.constexpr(UNIT * 8)
LOW_RANK_UNIT = tl.constexpr(16)
"""Ranks are multiples of it; said again where a rank is used, so that the compiler knows"""


@triton.jit
def part(SLAB, TABLE, at, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to a part's first element. A part that is not there gives one that must not be read.

    Args:
        at: the entry's distance in TABLE.
    """
    units = tl.load(TABLE + at + FIELD).to(tl.int64)
    return SLAB.to(tl.pointer_type(DTYPE), bitcast=True) + units * (_UNIT_BITS // DTYPE.primitive_bitwidth)


@triton.jit
def has(TABLE, at, FIELD: tl.constexpr):
    return tl.load(TABLE + at + FIELD) >= 0


@triton.jit
def rank_of(TABLE, at, WORDS: tl.constexpr = True, BYTES: tl.constexpr = False):
    """Of factors in the compute dtype if WORDS, of bytes if BYTES; 0 where the entry has others."""
    found = tl.load(TABLE + at + RANK)
    if not (WORDS and BYTES):
        found = tl.where(found % 2 == (1 if BYTES else 0), found, 0)
    return found // LOW_RANK_UNIT * LOW_RANK_UNIT


@triton.jit
def has_bytes(TABLE, at):
    """Whether the entry's factors are bytes: `device.BYTES`."""
    return tl.load(TABLE + at + RANK) % 2 == 1


@triton.jit
def segment(SEGMENTS, g):
    """(entry, start, stop) of a segment or row tile."""
    entry = tl.load(SEGMENTS + g * 4)
    return entry, tl.load(SEGMENTS + g * 4 + 1), tl.load(SEGMENTS + g * 4 + 2)


@triton.jit
def rows_times_matrix(
    X, x_stride, MATRIX, t, stop, r, rows, first, K: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x[t, k] M[r, k]^T over k in first .. first + SPAN: float32 [len t, len r].

    Args:
        t, stop: rows of x; from `stop` on they count as zeros. r, rows: the same of M, [rows, K].
        first: a multiple of SPAN. What lies beyond K counts as zeros.
    """
    k = first + tl.arange(0, BK)
    x_at = X + t[:, None].to(tl.int64) * x_stride + k[None, :]
    m_at = MATRIX + r[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((t.shape[0], r.shape[0]), tl.float32)
    for done in tl.range(0, SPAN, BK, num_stages=STAGES):
        if K % SPAN == 0 and SPAN % BK == 0:
            x = tl.load(x_at + done, mask=t[:, None] < stop, other=0.0)
            m = tl.load(m_at + done, mask=r[None, :] < rows, other=0.0)
        else:
            inside = K - done
            x = tl.load(x_at + done, mask=(t[:, None] < stop) & (k[None, :] < inside), other=0.0)
            m = tl.load(m_at + done, mask=(r[None, :] < rows) & (k[:, None] < inside), other=0.0)
        total = tl.dot(x, m, total, input_precision="ieee")
    return total


def table_arguments(deltas: DeviceDeltas, target: Target) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(SLAB, TABLE, table_stride)."""
    return deltas.slab, deltas.table_EJF[:, target.index], deltas.table_EJF.stride(0)


def measured(key: str, device: torch.device) -> configs.Settings | None:
    """What a benchmark found on this device."""
    if device.type != "cuda":
        return None
    return configs.lookup("delta_linear", _name(device), key)


@lru_cache(maxsize=8)
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def check_rows(x_TK: torch.Tensor, target: Target) -> None:
    assert x_TK.shape[1] == target.inputs, f"{x_TK.shape[1]} inputs, the target has {target.inputs}"
    assert x_TK.stride(1) == 1, "rows must be contiguous"
