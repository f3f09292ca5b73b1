"""Low-rank factors of bytes: products with x of A and of B, whose integers become 16-bit numbers in registers.

The factor is the left operand: 16 of its rows to an instruction for 8 of x, as many as a segment of a decode step has.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# Four bytes b to four numbers, exactly. bfloat16 has seven bits behind its leading one: 128 + the low seven bits of b
# less 128, or 256 where b is negative (its highest bit is the exponent's lowest). float16 has ten: 1024 + b + 128 less
# 1152. The language has the like for bfloat16 on Hopper; else it goes through float32, one byte at a time.
_TO_BF16 = tl.constexpr("""{ .reg .b32 x, low, high, minus;
mov.b32 minus, 0xBF80BF80;
prmt.b32 x, $2, 0x43, 0x4140;
and.b32 low, x, 0xFF7FFF7F;
and.b32 high, x, 0xFF80FF80;
fma.rn.bf16x2 $0, high, minus, low;
prmt.b32 x, $2, 0x43, 0x4342;
and.b32 low, x, 0xFF7FFF7F;
and.b32 high, x, 0xFF80FF80;
fma.rn.bf16x2 $1, high, minus, low; }""")
_TO_FP16 = tl.constexpr("""{ .reg .b32 moved, less, x;
mov.b32 less, 0xE480E480;
xor.b32 moved, $2, 0x80808080;
prmt.b32 x, moved, 0x64646464, 0x4140;
add.rn.f16x2 $0, x, less;
prmt.b32 x, moved, 0x64646464, 0x4342;
add.rn.f16x2 $1, x, less; }""")


@triton.jit
def numbers(q, like, PACKED: tl.constexpr):
    """int8 in the type of `like`. PACKED: by assembly, where that is faster."""
    dtype: tl.constexpr = like.dtype
    HOPPER: tl.constexpr = cuda_capability_geq(9, 0)
    if not PACKED or (HOPPER and dtype == tl.bfloat16):
        found = q.to(dtype)
    else:
        ASM: tl.constexpr = _TO_BF16 if dtype == tl.bfloat16 else _TO_FP16
        found = tl.inline_asm_elementwise(ASM, "=r,=r,r", [q], dtype=like.dtype, is_pure=True, pack=4)
    return found


@triton.jit
def bytes_times_rows(
    X, x_stride, A, scales, t, stop, r, rows, first, span, K: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """scales[r] sum over k of A[r, k] x[t, k], for k in first .. first + span: float32 [len r, len t].

    Args:
        t, stop: rows of x; from `stop` on they count as zeros. r, rows: the same of A, int8 [rows, K].
        first, span: first a multiple of BK; the span too, where BK divides K. What lies beyond K counts as zeros.
    """
    k = first + tl.arange(0, BK)
    a_at = A + r[:, None].to(tl.int64) * K + k[None, :]
    x_at = X + t[None, :].to(tl.int64) * x_stride + k[:, None]
    total = tl.zeros((r.shape[0], t.shape[0]), tl.float32)
    for done in tl.range(0, span, BK, num_stages=STAGES):
        a_mask = (r < rows)[:, None]
        x_mask = (t < stop)[None, :]
        if K % BK != 0:
            a_mask = a_mask & (k < K - done)[None, :]
            x_mask = x_mask & (k < K - done)[:, None]
        a = tl.load(a_at + done, mask=a_mask, other=0)
        x = tl.load(x_at + done, mask=x_mask, other=0.0)
        total = tl.dot(numbers(a, x, PACKED), x, total, input_precision="ieee")
    return total * tl.load(scales + r, mask=r < rows, other=0.0)[:, None]


@triton.jit
def add_expanded(
    total, H, b, t, stop, n, first, last, rank, at, T, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """total[n, t] += sum over i < rank, s of b[n, i] H[s, t, i], for n in first .. last.

    Args:
        b: int8 [N, rank]. at: int64, where row 0 of x would stand in H, and the member's columns.
    """
    i = tl.arange(0, BI)
    h_at = H + at + t[None, :].to(tl.int64) * WIDTH + i[:, None]
    b_at = b + n[:, None].to(tl.int64) * rank + i[None, :]
    for i0 in tl.range(0, rank, BI, num_stages=STAGES):
        inside = i0 + i < rank
        mask = inside[:, None] & (t < stop)[None, :]
        h = tl.load(h_at + i0, mask=mask, other=0.0)
        for s in tl.static_range(1, SPLIT):
            h += tl.load(h_at + (T * s).to(tl.int64) * WIDTH + i0, mask=mask, other=0.0)
        q = tl.load(b_at + i0, mask=((n >= first) & (n < last))[:, None] & inside[None, :], other=0)
        rounded = h.to(DTYPE)
        total = tl.dot(numbers(q, rounded, PACKED), rounded, total, input_precision="ieee")
    return total
