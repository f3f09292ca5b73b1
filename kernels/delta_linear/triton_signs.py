"""Decode-sized products with sign planes on the binary tensor core (compute capability 8.0 to 9.x).

`mma.m16n8k256 and.popc` multiplies 16 outputs x 256 signs, as they lie in memory (`kernels.fragments`), with 8 columns
of 256 bits: bit planes of the rows' 16-bit fixed point (`kernels.device.Planes`). With signs as bits b and rows as
q = sum_p 2^p plane_p - 2^16 plane_15, sum +-q = 2 sum_p weight_p popcount(b & plane_p) - sum q: exact in 32 bits.

The 8 columns are R rows x 8 / R planes, so that 1, 4 and 8 rows of one variant cost 2, 8 and 16 instructions a tile,
without waste. From 4 on, planes are taken from the highest down and the sums doubled in between (Horner), so that a few
registers hold the rows' products and nothing is summed over lanes. About 8 rows of one variant cost as much time as
reading its signs; more of them reuse the signs in registers.

An item is TILES tiles of 16 outputs of one segment, all of K, which a program's warps share out. All of its signs are
asked for before anything waits for them: what keeps the memory busy is how many bytes all programs wait for at a time
(`triton_items`).

Not covered: chips whose `mma.b1` is emulated or gone (`triton_unpack`). `xor.popc`, which would save the identity
above, is emulated everywhere from 9.0 on.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    " {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$0,$1,$2,$3};\n"
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    " {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$14,$15}, {$4,$5,$6,$7};"
)
_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 8 + [str(i) for i in range(8)]))


@triton.jit
def multiply(signs, planes, low, high):
    """low += signs x the first two words of planes, high += signs x the last two; int32 [TILES, WARPS * 128], of which
    a lane holds 4 words that follow each other. Never pure: the compiler may not move it out of a uniform flow."""
    return tl.inline_asm_elementwise(
        _MMA, _OPERANDS, [signs, planes, low, high], dtype=(tl.int32, tl.int32), is_pure=False, pack=4
    )


@triton.jit
def load_signs(at, tile, tiles, KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr):
    """A tuple of int32 [TILES, WARPS * 128], one for each step along K; anything where K has ended, or where the first
    tile is not among the tiles. Tiles beyond the last repeat it."""
    e = tl.arange(0, WARPS * 128)[None, :]
    t = tl.minimum(tile + tl.arange(0, TILES), tiles - 1)[:, None].to(tl.int64)
    room = tl.where(tile < tiles, KB * 128, 0)
    signs = ()
    for s in tl.static_range((KB + WARPS - 1) // WARPS):
        words = at + t * (KB * 128) + (s * WARPS * 128 + e)
        inside = (e < room - s * WARPS * 128) & (t >= 0)
        signs = signs + (tl.load(words, mask=inside, eviction_policy="evict_first"),)
    return signs


@triton.jit
def load_planes(WORDS, first, stop, p, KB: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """Planes p + ROWS * i and 8 more, i < 8 / ROWS, of rows first .. first + ROWS, for all steps along K; rows beyond
    the last repeat it."""
    e = tl.arange(0, WARPS * 128)
    column = e // 16 % 8
    row = tl.minimum(first + column % ROWS, stop - 1)
    words = WORDS + row * (KB * 128) + e // 128 * 128 + (column // ROWS * ROWS + p) * 16 + e % 16
    planes = ()
    for s in tl.static_range((KB + WARPS - 1) // WARPS):
        if (s + 1) * WARPS <= KB:
            planes = planes + (tl.load(words + s * WARPS * 128)[None, :],)
        else:
            inside = e < (KB - s * WARPS) * 128
            planes = planes + (tl.load(words + s * WARPS * 128, mask=inside, other=0)[None, :],)
    return planes


@triton.jit
def _multiply_all(signs, planes, low, high, TILES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    for s in tl.static_range(STEPS):
        low, high = multiply(signs[s], tl.broadcast_to(planes[s], (TILES, WIDTH)), low, high)
    return low, high


@triton.jit
def sums(
    signs, planes, WORDS, first, stop,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sum_k b[n, k] q[row, k]: int32 [ROWS, TILES * 16], of one group's tiles.

    Args:
        planes: the highest, `load_planes` of ROWS - 1.
    """
    WIDTH: tl.constexpr = WARPS * 128
    STEPS: tl.constexpr = (KB + WARPS - 1) // WARPS
    low = tl.zeros((TILES, WIDTH), tl.int32)
    high = tl.zeros((TILES, WIDTH), tl.int32)
    e = tl.arange(0, WIDTH)[None, :]
    column = e // 4 % 4 * 2 + e % 2
    weight = 1 << (column // ROWS * ROWS)
    if ROWS == 1:
        low, high = _multiply_all(signs, planes, low, high, TILES, WIDTH, STEPS)
        total = low * weight + high * tl.where(column == 7, -32768, weight * 256)
    else:
        low, high = _multiply_all(signs, planes, low, high, TILES, WIDTH, STEPS)
        high = tl.where(column // ROWS == 8 // ROWS - 1, -high, high)  # plane 15 counts -2^15
        following = load_planes(WORDS, first, stop, ROWS - 2, KB, WARPS, ROWS)
        for left in range(ROWS - 2, -1, -1):
            planes = following
            following = load_planes(WORDS, first, stop, tl.maximum(left - 1, 0), KB, WARPS, ROWS)
            low, high = _multiply_all(signs, planes, low + low, high + high, TILES, WIDTH, STEPS)
        total = (low + high * 256) * weight
    return _gather(total, TILES, WARPS, ROWS)


@triton.jit
def _gather(total, TILES: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """From an accumulator's fragments to [ROWS, TILES * 16]: sums over warps and over the planes of a row."""
    if ROWS == 1:
        lanes = tl.sum(tl.reshape(total, (TILES, WARPS, 8, 4, 2, 2)), 5)
        rows = tl.permute(tl.sum(tl.sum(lanes, 3), 1), (0, 2, 1))  # TILES, half, g
    elif ROWS == 4:
        lanes = tl.sum(tl.reshape(total, (TILES, WARPS, 8, 2, 2, 2, 2)), 3)
        rows = tl.permute(tl.sum(lanes, 1), (2, 4, 0, 3, 1))  # pair of rows, row of the pair, TILES, half, g
    else:
        lanes = tl.reshape(total, (TILES, WARPS, 8, 4, 2, 2))
        rows = tl.permute(tl.sum(lanes, 1), (2, 4, 0, 3, 1))
    return tl.reshape(rows, (ROWS, TILES * 16))


@triton.jit
def store_rows(
    sums, OUT, row, stop, n, outputs, limit, width, scale, x_scale, x_sum, zero, plane,
    MANY: tl.constexpr,
):  # fmt: skip
    """OUT[row, n] = (2 sums - sum q) scale[row] scale[n]; planes after the first add to what is there.

    Args:
        n: output of each column of sums. outputs: how many the variant has; zeros follow, up to `limit`.
        width: columns of OUT.
        zero: of each output, for the first plane. MANY: whether a variant may have several planes.
    """
    y = (2 * sums - x_sum[:, None]).to(tl.float32) * (x_scale[:, None] * scale[None, :])
    at = OUT + row[:, None].to(tl.int64) * width + n[None, :]
    if MANY:
        y += zero[None, :] * (x_sum.to(tl.float32) * x_scale)[:, None]
        later = (row[:, None] < stop) & (n[None, :] < tl.where(plane > 0, limit, 0))
        y += tl.load(at, mask=later, other=0.0)
    tl.store(at, tl.where(n[None, :] < outputs, y, 0.0), mask=(row[:, None] < stop) & (n[None, :] < limit))


@triton.jit
def _row_values(XSCALE, XSUM, first, stop, ROWS: tl.constexpr):
    there = tl.minimum(first + tl.arange(0, ROWS), stop - 1)
    return tl.load(XSCALE + there), tl.load(XSUM + there)


@triton.jit
def some_rows(
    signs, WORDS, XSCALE, XSUM, OUT, first, stop, tile, outputs, limit, width, scale, zero, plane,
    KB: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS of an item of one plane, as far as stop."""
    x_scale, x_sum = _row_values(XSCALE, XSUM, first, stop, ROWS)
    planes = load_planes(WORDS, first, stop, ROWS - 1, KB, WARPS, ROWS)
    found = sums(signs, planes, WORDS, first, stop, KB, TILES, WARPS, ROWS)
    row = first + tl.arange(0, ROWS)
    n = tile * 16 + tl.arange(0, TILES * 16)
    store_rows(found, OUT, row, stop, n, outputs, limit, width, scale, x_scale, x_sum, zero, plane, MANY)
