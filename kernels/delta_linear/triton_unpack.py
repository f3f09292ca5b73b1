"""Decode-sized products with sign planes on any chip: signs are unpacked to +1 and -1 and multiplied as x is.

About 3 operations a sign, so it is bound by them and not by memory. x times its column scales is rounded to the compute
dtype, which costs up to 2^-9 of each product for bfloat16.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.triton_parts import COL, PLANES, SCALE, SIGN, ZERO


@triton.jit
def member_of(block, M1, M2, tiles, MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """(member, first tile, tile after the member's last) of a block of BLOCK tiles; none has tiles of two members.

    Args:
        M1, M2: first tiles of the second and third member, `tiles` where there are none. tiles: of all.
    """
    member, tile, stop = block * 0, block * BLOCK, tiles
    if MEMBERS > 1:
        first = (M1 + BLOCK - 1) // BLOCK
        second = (M2 - M1 + BLOCK - 1) // BLOCK
        member = (block >= first).to(tl.int32) + (block >= first + second).to(tl.int32)
        start = tl.where(member == 0, 0, tl.where(member == 1, M1, M2))
        skipped = tl.where(member == 0, 0, tl.where(member == 1, first, first + second))
        tile = start + (block - skipped) * BLOCK
        stop = tl.where(member == 0, M1, tl.where(member == 1, M2, tiles))
    return member, tile, stop


@triton.jit
def _signs(WORDS, tile, tiles, half, KB: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """+1 and -1 of half a block, columns from 128 half on: [TILES * 16, 128]. Tiles beyond the last repeat it."""
    r = tl.arange(0, TILES * 16)[:, None]
    word = tl.arange(0, 4)[None, :]
    t = tl.minimum(tile + r // 16, tiles - 1).to(tl.int64)
    at = WORDS + (t * KB + half // 2) * 128 + (r % 8 * 4 + word) * 4 + r % 16 // 8 + half % 2 * 2
    bits = tl.reshape((tl.load(at)[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, (TILES * 16, 128))
    # -1 with its sign flipped where the bit is set.
    if tl.float32 == DTYPE:
        signs = ((bits << 31) ^ -0x40800000).to(tl.float32, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        signs = ((bits << 15) ^ 0xBF80).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        signs = ((bits << 15) ^ 0xBC00).to(tl.int16).to(tl.float16, bitcast=True)
    return signs


@triton.jit
def unpack_kernel(
    X, SLAB, TABLE, table_stride, SEGMENTS, OUT, base_outputs, width, M1, M2, halves,
    K: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Grid [blocks, segments]: OUT[row, n] of all rows of a segment, zero where the variant has no signs.

    Args: as `triton_share.sign_share`, and
        halves: 2 KB (see triton_flat on loops).
    """
    entry, start, stop = parts.segment(SEGMENTS, tl.program_id(1))
    at = entry * table_stride
    outputs = tl.load(TABLE + at + parts.OUTPUTS)
    outputs = tl.where(outputs > 0, outputs, base_outputs)
    tiles = (outputs + 15) // 16
    planes = tl.where(parts.has(TABLE, at, SIGN), tl.load(TABLE + at + PLANES), 0)
    member, tile, stop_tile = member_of(tl.program_id(0), M1, M2, (width + 15) // 16, MEMBERS, TILES)
    planes = tl.where(tile < tiles, planes, 0)
    n = tile * 16 + tl.arange(0, TILES * 16)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        y = tl.zeros((TILES * 16, ROWS), tl.float32)
        for plane in range(planes):
            product, total = _plane(
                X, SLAB, TABLE, at, plane, member, tile, tiles, row, stop, halves, K, KB, TILES, ROWS, MEMBERS, COLUMNS
            )  # fmt: skip
            scale = parts.part(SLAB, TABLE, at, SCALE, tl.float32) + plane * tiles * 16
            y += product * tl.load(scale + n, mask=n < tiles * 16, other=0.0)[:, None]
            if MANY:
                limit = tl.where((plane == 0) & parts.has(TABLE, at, ZERO), tiles * 16, 0)
                zero = parts.part(SLAB, TABLE, at, ZERO, tl.float32)
                y += tl.load(zero + n, mask=n < limit, other=0.0)[:, None] * total[None, :]
        y = tl.where(n[:, None] < outputs, y, 0.0)
        out = OUT + row[None, :].to(tl.int64) * width + n[:, None]
        tl.store(out, y, mask=(row[None, :] < stop) & (n[:, None] < tl.minimum(stop_tile * 16, width)))


@triton.jit
def _plane(
    X, SLAB, TABLE, at, plane, member, tile, tiles, row, stop, halves,
    K: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One plane's products [TILES * 16, ROWS] and the sums of x [ROWS], both without scales."""
    words = parts.part(SLAB, TABLE, at, SIGN, tl.int32) + plane * tiles * (KB * 128)
    product = tl.zeros((TILES * 16, ROWS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for half in range(halves):
        k = half * 128 + tl.arange(0, 128)
        x = tl.load(X + row[None, :] * K + k[:, None], mask=(row[None, :] < stop) & (k[:, None] < K), other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
        if COLUMNS:
            limit = tl.where(parts.has(TABLE, at, COL), K, 0)
            column = parts.part(SLAB, TABLE, at, COL, tl.float32) + (plane * MEMBERS + member) * (KB * 256)
            x = (x.to(tl.float32) * tl.load(column + k, mask=k < limit, other=1.0)[:, None]).to(x.dtype)
        product = tl.dot(
            _signs(words, tile, tiles, half, KB, TILES, x.dtype), x, product, input_precision="ieee"
        )  # fmt: skip
    return product, total
