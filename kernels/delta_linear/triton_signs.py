"""Decode-sized products of a row with sign planes on the binary tensor core (compute capability 8.0 to 9.x).

`mma.m16n8k256 and.popc` multiplies 16 outputs x 256 signs, as they lie in memory (`kernels.fragments`), with 8 columns
of 256 bits: bit planes of the row's 16-bit fixed point (`kernels.device.Planes`). With signs as bits b and the row as
q = sum_p 2^p plane_p - 2^16 plane_15, sum +-q = 2 sum_p weight_p popcount(b & plane_p) - sum q: exact in 32 bits.

Signs stream: a program goes over its tiles in a loop that the compiler pipelines, so that asynchronous copies of later
tiles to shared memory are under way while these are multiplied. The planes of its row stay in registers all the while.
A tile's columns are shared by SPREAD warps: one where a warp's registers hold all planes of a row. What not even those
of all warps hold is multiplied in PARTS, one loop after the other; the sums of later parts are added to what is there.
(`triton_share` says which tiles a program has.)

Not covered: several rows of one variant (`triton_digits`); chips whose `mma.b1` is emulated or gone (`triton_unpack`).
`xor.popc`, which would save the identity above, is emulated everywhere from 9.0 on.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    " {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$0,$1,$2,$3};\n"
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
    " {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$14,$15}, {$4,$5,$6,$7};"
)
OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 8 + [str(i) for i in range(8)]))


@triton.jit
def multiply(signs, planes, low, high):
    """low += signs x the first two words of planes, high += signs x the last two; int32 [TILES, SPREAD * 128], of which
    a lane holds 4 words that follow each other. Never pure: the compiler may not move it out of a uniform flow."""
    return tl.inline_asm_elementwise(
        MMA, OPERANDS, [signs, planes, low, high], dtype=(tl.int32, tl.int32), is_pure=False, pack=4
    )


@triton.jit
def load_planes(
    WORDS, row, KB: tl.constexpr, START: tl.constexpr, STEPS: tl.constexpr, COPIES: tl.constexpr, SPREAD: tl.constexpr
):  # fmt: skip
    """Planes of a row: STEPS of int32 [COPIES, SPREAD * 128], blocks of columns from START on, zero beyond the last.

    COPIES: one, or one for each tile where each is another warp's: they would else pass from warp to warp.
    """
    e = tl.arange(0, SPREAD * 128)[None, :]
    words = tl.broadcast_to(WORDS + row * (KB * 128) + e, (COPIES, SPREAD * 128))
    planes = ()
    for s in tl.static_range(STEPS):
        inside = tl.arange(0, COPIES)[:, None] >= 0
        if START + (s + 1) * SPREAD > KB:
            inside = inside & (e < (KB - START - s * SPREAD) * 128)
        planes = planes + (tl.load(words + (START + s * SPREAD) * 128, mask=inside, other=0),)
    return planes


@triton.jit
def load_signs(at, inside, KB: tl.constexpr, START: tl.constexpr, STEPS: tl.constexpr, SPREAD: tl.constexpr):
    """STEPS of int32 [TILES, SPREAD * 128]. Where columns have ended planes are zero, and signs do not matter.

    Args:
        at: pointers [TILES, SPREAD * 128] to the signs of the first block of columns. inside: [TILES, 1].
    """
    signs = ()
    e = tl.arange(0, SPREAD * 128)[None, :]
    for s in tl.static_range(STEPS):
        mask = inside
        if START + (s + 1) * SPREAD > KB:
            mask = mask & (e < (KB - START - s * SPREAD) * 128)
        found = tl.load(at + (START + s * SPREAD) * 128, mask=mask, other=0, eviction_policy="evict_first")
        signs = signs + (found,)
    return signs


@triton.jit
def _begun(shape: tl.constexpr, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros(shape, tl.int32),)
    return zeros


@triton.jit
def _products(signs, planes, STEPS: tl.constexpr, CHAINS: tl.constexpr):
    """Sums of the products with planes 0 to 7, and with 8 to 15. A product waits long for the one that it adds to: so
    every CHAINS-th is added up by itself."""
    low, high = _begun(signs[0].shape, CHAINS), _begun(signs[0].shape, CHAINS)
    for s in tl.static_range(STEPS):
        lower, higher = multiply(signs[s], tl.broadcast_to(planes[s], signs[s].shape), low[0], high[0])
        low, high = low[1:] + (lower,), high[1:] + (higher,)
    lower, higher = low[0], high[0]
    for i in tl.static_range(1, CHAINS):
        lower, higher = lower + low[i], higher + high[i]
    return lower, higher


@triton.jit
def sums(signs, planes, TILES: tl.constexpr, SPREAD: tl.constexpr, STEPS: tl.constexpr, CHAINS: tl.constexpr):
    """sum_k b[n, k] q[k]: int32 in the shape of `places` of one row."""
    e = tl.arange(0, SPREAD * 128)[None, :]
    column = e // 4 % 4 * 2 + e % 2
    weight = 1 << column
    low, high = _products(signs, planes, STEPS, CHAINS)
    total = low * weight + high * tl.where(column == 7, -32768, weight * 256)
    lanes = tl.sum(tl.reshape(total, (TILES, SPREAD, 8, 4, 2, 2)), 5)
    return tl.reshape(tl.sum(tl.sum(lanes, 3), 1), (TILES, 8, 1, 2, 1))


@triton.jit
def places(ROWS: tl.constexpr):
    """(row, output) of the elements of `sums` of one tile, in shapes that broadcast to [TILES, 8, ROWS / 2, 2, 2] (of
    one row: [TILES, 8, 1, 2, 1])."""
    g = tl.arange(0, 8)[None, :, None, None, None]
    half = tl.arange(0, 2)[None, None, None, :, None]
    if ROWS == 1:
        row = tl.zeros((1, 1, 1, 1, 1), tl.int32)
    else:
        pair = tl.arange(0, ROWS // 2)[None, None, :, None, None]
        row = pair * 2 + tl.arange(0, 2)[None, None, None, None, :]
    return row, g + 8 * half
