"""The kernel behind `device.cos_sin`."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# pi / 2 in parts (Cody and Waite 1980): products of the first two with counts below 2^19 are exact.
_TURN_1 = tl.constexpr(1.5625)
_TURN_2 = tl.constexpr(0.00830078125)
_TURN_3 = tl.constexpr(-4.454455103380768e-06)
_PER_TURN = tl.constexpr(0.6366197723675814)


@triton.jit
def _cos_sin_of(x):
    """Of float32 angles below 800 000, within 2e-7. Quarter turns off, then Cephes' polynomials (Moshier 1989). The
    library's own functions keep an array in local memory."""
    quarter = tl.floor(x * _PER_TURN + 0.5)
    x = ((x - quarter * _TURN_1) - quarter * _TURN_2) - quarter * _TURN_3
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = quarter.to(tl.int32) & 3
    swap = (quarter & 1) == 1
    cos = tl.where(swap, sine, cosine)
    sin = tl.where(swap, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def cos_sin_kernel(POSITIONS, ENTRY, TABLE, COS, SIN, HALF: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """Program: a row. A row of TABLE: HALF inverse frequencies, then scaling, growth, start."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    mine = TABLE + tl.load(ENTRY + row) * (HALF + 3)
    position = tl.load(POSITIONS + row)
    frequency = tl.load(mine + i, mask=i < HALF, other=0.0)
    scaling = tl.load(mine + HALF)
    growth = tl.load(mine + HALF + 1)
    start = tl.load(mine + HALF + 2)
    # NTK by length: theta * stretch^(D / (D - 2)), so frequency i falls by stretch^(2i / (D - 2)).
    stretch = 1.0 + growth * tl.maximum(position.to(tl.float32) + 1.0 - start, 0.0)
    slower = tl.exp2(tl.log2(stretch) * (i.to(tl.float32) * (-1.0 / (HALF - 1))))
    frequency = tl.where(stretch > 1.0, frequency * slower, frequency)
    cos, sin = _cos_sin_of(position.to(tl.float32) * frequency)
    if PDL:
        gdc_wait()
    tl.store(COS + row * HALF + i, cos * scaling, mask=i < HALF)
    tl.store(SIN + row * HALF + i, sin * scaling, mask=i < HALF)
