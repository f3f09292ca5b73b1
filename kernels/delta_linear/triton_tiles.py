"""A tile of D in registers, from signs, scales, column scales, zero terms and dense differences.

Sign words are read as bytes: a byte holds the signs of the 8 neighbouring columns that a thread has of a 16-bit matrix,
wherever its word stands in the fragments. So a tile of signs needs no exchange between threads but the bytes' own.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import COL, DENSE, SCALE, SIGN, ZERO

# $1: two weights. $2: their byte of signs. $4: what moves the two signs to bits 15 and 31. $6: the scale, twice.
# The scales' signs are flipped where the bit is 0: they come negated.
_ADD_BF16 = tl.constexpr("""{ .reg .b32 t, one;
mov.b32 one, 0x3F803F80;
mul.lo.u32 t, $2, $4;
lop3.b32 t, t, 0x80008000, $6, 0x6A;
fma.rn.bf16x2 $0, $1, one, t; }""")
_ADD_FP16 = tl.constexpr("""{ .reg .b32 t;
mul.lo.u32 t, $2, $4;
lop3.b32 t, t, 0x80008000, $6, 0x6A;
add.rn.f16x2 $0, $1, t; }""")


@triton.jit
def sign_bytes(SIGNS, plane, n, inside, k0, H, B: tl.constexpr, BK: tl.constexpr):
    """Bytes of signs of rows n and columns k0 .. k0 + BK of one plane: int32 [len n, BK / 8].

    Args:
        SIGNS: the part, as bytes. H, B: its tiles.
        inside: which rows to read; the others give 0.
        k0: a multiple of BK, which divides 256 or is a multiple of it.
    """
    byte = k0 // 8 + tl.arange(0, BK // 8)
    word = byte // 4 % 8
    row = ((plane * H + n // 16) * B).to(tl.int64) * 512 + n % 8 * 64 + n % 16 // 8 * 4
    column = byte // 32 * 512 + word % 4 * 16 + word // 4 * 8 + byte % 4
    mask = inside[:, None]
    if (B * 256) % BK != 0:
        mask = mask & (byte[None, :] < B * 32)
    return tl.load(SIGNS + row[:, None] + column[None, :], mask=mask, other=0).to(tl.int32)


@triton.jit
def spread(of_bytes, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / 8] repeated for the 8 columns of each byte: [BN, BK / 8, 8]."""
    return tl.broadcast_to(of_bytes[:, :, None], (BN, BK // 8, 8))


@triton.jit
def signed(scale, of_bytes, BN: tl.constexpr, BK: tl.constexpr):
    """+scale[n] where the bit is set, else -scale[n]: float32 [BN, BK]."""
    shift = (31 - tl.arange(0, 8))[None, None, :]
    flipped = ((spread(of_bytes, BN, BK) << shift) & -2147483648) ^ (-scale).to(tl.int32, bitcast=True)[:, None, None]
    return tl.reshape(flipped, (BN, BK)).to(tl.float32, bitcast=True)


@triton.jit
def ones(of_bytes, DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """+1 where the bit is set, else -1. Not `add_signed` to 0: constants may lie otherwise in registers than loads."""
    ONE: tl.constexpr = tl.constexpr(0x3F80 if tl.bfloat16 == DTYPE else 0x3C00)
    shift = (15 - tl.arange(0, 8))[None, None, :]
    flipped = ((spread(of_bytes, BN, BK) << shift) & 0x8000) ^ (0x8000 | ONE)
    return tl.reshape(flipped, (BN, BK)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def add_signed(w, scale, of_bytes, BN: tl.constexpr, BK: tl.constexpr):
    """w + (+scale or -scale), two columns at a time and rounded once. scale is rounded to w's type first."""
    twice = tl.arange(0, 8) // 2 * 2
    move = (1 << (15 - twice)) + (1 << (30 - twice))
    negated = tl.broadcast_to((-scale).to(w.dtype)[:, None], (BN, BK))
    moves = tl.reshape(tl.broadcast_to(move[None, None, :], (BN, BK // 8, 8)), (BN, BK))
    bits = tl.reshape(spread(of_bytes, BN, BK), (BN, BK))
    ADD: tl.constexpr = _ADD_BF16 if w.dtype == tl.bfloat16 else _ADD_FP16
    return tl.inline_asm_elementwise(
        ADD, "=r,r,r,r,r,r,r", [w, bits, moves, negated], dtype=w.dtype, is_pure=True, pack=2
    )  # fmt: skip


@triton.jit
def difference(
    SLAB, TABLE, at, planes, n, inside, k0, member, MEMBERS: tl.constexpr, N, K: tl.constexpr,
    DTYPE: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr, DENSES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """D[n, k0 .. k0 + BK] without its low-rank part: float32 [BN, BK].

    Args:
        planes: how many sign planes the entry has, at most PLANES. Zero terms come with two or more.
        member: int32 [BN], the member of a fused target that each row belongs to.
    """
    H = (N + 15) // 16
    B: tl.constexpr = (K + 255) // 256
    k = k0 + tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    if PLANES > 0:
        signs = parts.part(SLAB, TABLE, at, SIGN, tl.uint8)
        scales = parts.part(SLAB, TABLE, at, SCALE, tl.float32)
        for p in tl.static_range(PLANES):
            there = inside & (tl.zeros_like(n) + p < planes)
            scale = tl.load(scales + p * H * 16 + n, mask=there, other=0.0)
            term = signed(scale, sign_bytes(signs, p, n, there, k0, H, B, BK), BN, BK)
            if COLUMNS:
                cols = parts.part(SLAB, TABLE, at, COL, tl.float32)
                scaled = (tl.zeros_like(k) + tl.load(TABLE + at + COL) >= 0) & (tl.zeros_like(k) + p < planes)
                if (B * 256) % BK != 0:
                    scaled = scaled & (k < B * 256)
                for m in tl.static_range(MEMBERS):
                    col = tl.load(cols + (p * MEMBERS + m) * (B * 256) + k, mask=scaled, other=1.0)
                    term *= tl.where((member == m)[:, None], col[None, :], 1.0)
            total = term if p == 0 else total + term
    if PLANES > 1:
        zeros = parts.part(SLAB, TABLE, at, ZERO, tl.float32)
        shifted = inside & (tl.zeros_like(n) + tl.load(TABLE + at + ZERO) >= 0)
        total += tl.load(zeros + n, mask=shifted, other=0.0)[:, None]
    if DENSES:
        dense = parts.part(SLAB, TABLE, at, DENSE, DTYPE)
        there = inside & (tl.zeros_like(n) + tl.load(TABLE + at + DENSE) >= 0) & (n < N)
        mask = there[:, None]
        if K % BK != 0:
            mask = mask & (k < K)[None, :]
        total += tl.load(dense + n[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def member_of(n, MEMBERS: tl.constexpr, FIRST_1, FIRST_2):
    """Which member of a fused target each output belongs to."""
    member = tl.zeros_like(n)
    if MEMBERS > 1:
        member += (n >= FIRST_1).to(tl.int32)
    if MEMBERS > 2:
        member += (n >= FIRST_2).to(tl.int32)
    return member
