"""Products of several rows of one variant with a plane of signs, on the integer tensor core.

Eight rows, as 16-bit fixed point (`kernels.device.Planes`), are two byte digits each: q = 256 high + low, low unsigned.
`mma.m16n8k32` multiplies bytes: 16 outputs x 32 columns, with 8 rows. A word of signs in `kernels.fragments` order has
32 columns of one output; bit p of each of its bytes, masked out, is an operand: of columns 8 i + p, i < 4. So a shift
and a mask make four operands at a time, and 16 products multiply 16 x 256 signs with 8 rows. They are exact, and the
sums are those of `triton_signs`, bit for bit.

Digits are made of bit planes, before a program's loop over tiles: words of 8 planes of the same 32 columns become
digits of these by transposing 8 x 8 bits in every byte. They stay in registers, 32 of them for a block of 256 columns;
all warps share a tile's columns, and rows longer than what they hold are multiplied in parts.

Sums of masked bits: below 2^7 * 255 * 65536 < 2^31, and `kernels.planes` has no more columns than that.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32"
    " {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$0,$1,$2,$3};\n"
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
    " {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$14,$15}, {$4,$5,$6,$7};"
)
_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 8 + [str(i) for i in range(8)]))


@triton.jit
def _multiply(signs, digits, low, high):
    """low += signs x the first two words of digits, high += signs x the last two: int32 [TILES, SPREAD * 128], of which
    a lane holds 4 words that follow each other. Never pure: the compiler may not move it out of a uniform flow."""
    return tl.inline_asm_elementwise(
        _MMA, _OPERANDS, [signs, digits, low, high], dtype=(tl.int32, tl.int32), is_pure=False, pack=4
    )


@triton.jit
def _exchanged(words, BITS: tl.constexpr, MASK: tl.constexpr):
    """Words i and i + BITS trade the bits that MASK leaves out of the one for those in MASK of the other."""
    out = ()
    for i in tl.static_range(8):
        if i & BITS == 0:
            out = out + ((words[i] & MASK) | ((words[i + BITS] & MASK) << BITS),)
        else:
            out = out + (((words[i - BITS] >> BITS) & MASK) | (words[i] & ~MASK),)
    return out


@triton.jit
def _transposed(words):
    """Bit 8 i + j of word k becomes bit 8 i + k of word j."""
    return _exchanged(_exchanged(_exchanged(words, 4, 0x0F0F0F0F), 2, 0x33333333), 1, 0x55555555)


@triton.jit
def load_digits(
    WORDS, first, stop,
    KB: tl.constexpr, START: tl.constexpr, STEPS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Digits of rows first .. first + 8: STEPS of 8 int32 [1, SPREAD * 128], blocks of columns from START on, zero
    beyond the last. Rows beyond the last repeat it.

    Word 4 lane + 2 d + h of the p-th, lane = 4 g + q, has in byte i digit d (0: low) of row g, column
    128 h + 32 q + 8 i + p.
    """
    e = tl.arange(0, SPREAD * 128)[None, :]
    row = tl.minimum(first + e // 16 % 8, stop - 1)
    words = WORDS + row * (KB * 128) + e // 128 * 128 + e % 16
    digits = ()
    for s in tl.static_range(STEPS):
        inside = e >= 0
        if START + (s + 1) * SPREAD > KB:
            inside = e < (KB - START - s * SPREAD) * 128
        planes = ()
        for p in tl.static_range(8):
            planes = planes + (tl.load(words + (START + s * SPREAD) * 128 + p * 16, mask=inside, other=0),)
        digits = digits + (_transposed(planes),)
    return digits


@triton.jit
def _bits(words, P: tl.constexpr):
    """Bit P of every byte, as 64 where P is even and 128 where it is odd."""
    return (words << (6 - P // 2 * 2)) & (-0x7F7F7F80 if P % 2 else 0x40404040)  # 0x80808080


@triton.jit
def _added(sums):
    """Sums of bits that stand for 64 and 128, as if all stood for 1."""
    return (sums[0] * 2 + sums[1]) >> 7


@triton.jit
def _over_warps(total, TILES: tl.constexpr, SPREAD: tl.constexpr):
    """Sums [TILES, 128] over the warps that share a tile. What is split lies in one thread: all partials of an output
    are brought together in one passage through shared memory, where `tl.sum` takes three."""
    parts = tl.permute(tl.reshape(total, (TILES, 2, SPREAD // 2, 128)), (0, 3, 2, 1))
    first, second = tl.split(parts)
    if SPREAD == 2:
        found = tl.reshape(first, (TILES, 128)) + tl.reshape(second, (TILES, 128))
    else:
        found = _over_warps(tl.reshape(tl.permute(first + second, (0, 2, 1)), (TILES, SPREAD * 64)), TILES, SPREAD // 2)
    return found


@triton.jit
def digit_sums(signs, digits, TILES: tl.constexpr, SPREAD: tl.constexpr, STEPS: tl.constexpr):
    """sum_k b[n, k] q[row, k]: int32 [TILES, 8, 4, 2, 2], as `triton_signs.places` of 8 rows has it.

    Four bits of a byte are masked out where they lie and have sums of their own, so that a product need not wait for
    the one before it; the other four are shifted to their places.
    """
    low, high = (), ()
    for _ in tl.static_range(2):
        zeros = tl.zeros(signs[0].shape, tl.int32)
        low, high = low + (zeros,), high + (zeros,)
    for s in tl.static_range(STEPS):
        for p in tl.static_range(8):
            operand = tl.broadcast_to(digits[s][p], signs[s].shape)
            lower, higher = _multiply(_bits(signs[s], p), operand, low[0], high[0])
            low, high = low[1:] + (lower,), high[1:] + (higher,)
    total = _added(low) + _added(high) * 256
    return tl.reshape(_over_warps(total, TILES, SPREAD), (TILES, 8, 4, 2, 2))
