"""What the sampling kernels share: a row's logits, weights and keys, and what one stage leaves for the next.

A row's `source` is (its logits, its counts, whether it has any, repetition, its inverse, frequency, presence,
vocabulary, width of the tensor); its `spread` is (best logit, scale, reach).

Floats that decide which token is drawn are computed without fused multiply-adds (launches say so), by
`reference.penalised` and `reference.weight` literally.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sampling.reference import HALVING, ONE
from kernels.sampling.rows import COLUMNS, FRACTION, PER_TOKEN, RowField

LINE_WIDTH = tl.constexpr(COLUMNS)
SCALE = tl.constexpr(int(RowField.SCALE))
REACH = tl.constexpr(int(RowField.REACH))
TOP_K = tl.constexpr(int(RowField.TOP_K))
TOP_P = tl.constexpr(int(RowField.TOP_P))
UNIFORM = tl.constexpr(int(RowField.UNIFORM))
PRESENCE = tl.constexpr(int(RowField.PRESENCE))
FREQUENCY = tl.constexpr(int(RowField.FREQUENCY))
REPETITION = tl.constexpr(int(RowField.REPETITION))
INVERSE = tl.constexpr(int(RowField.INVERSE))
COUNTS_ROW = tl.constexpr(int(RowField.COUNTS))
VOCAB = tl.constexpr(int(RowField.VOCAB))
LOGPROB = tl.constexpr(int(RowField.LOGPROB))
_H0, _H1, _H2, _H3, _H4, _H5 = (tl.constexpr(factor) for factor in HALVING)
OCTAVES = tl.constexpr(ONE)
FRACTION_BITS = tl.constexpr(FRACTION)
FRACTION_MASK = tl.constexpr(2**FRACTION - 1)
COUNT_STEP = tl.constexpr(PER_TOKEN)
BINS_PER_OCTAVE = tl.constexpr(64)
LAST_ID = tl.constexpr(2**31 - 1)
LOWEST_KEY = tl.constexpr(-(2**40))
"""Below every key"""

# state_SX
STATE_WIDTH = tl.constexpr(16)
PENDING = tl.constexpr(0)
"""1: best left this row to the next stages"""
K_BIN = tl.constexpr(1)
"""In which top-k ends; BINS: nowhere"""
K_ABOVE = tl.constexpr(2)
"""How many tokens lie in bins before it"""
K_MASS = tl.constexpr(3)
"""And their weights"""
P_FIRST = tl.constexpr(4)
"""In which of these bins top-p ends"""
P_LAST = tl.constexpr(5)
P_MASS = tl.constexpr(6)
"""The weights in bins before the first of them"""
CUT_ID = tl.constexpr(7)
"""The last id that is kept of the logits that equal CUT_LOGIT"""

# level_SX
LEVEL_WIDTH = tl.constexpr(8)
BEST_LOGIT = tl.constexpr(0)
LOGSUM = tl.constexpr(1)
"""log of the sum of exp(l)"""
CUT_LOGIT = tl.constexpr(2)
"""Larger logits are kept."""
CHOSEN_LOGIT = tl.constexpr(3)
"""Of the token drawn"""

# tickets_SX, int32
TICKET_WIDTH = tl.constexpr(8)
LIST_LENGTH = tl.constexpr(4)
"""How many tokens are in the row's list"""


@triton.jit
def floats_of(LINE):
    """The same memory, as float32."""
    return LINE.to(tl.pointer_type(tl.float32))


@triton.jit
def source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width):
    FLOATS, counts = floats_of(LINE), tl.load(LINE + COUNTS_ROW)
    return (
        LOGITS + row.to(tl.int64) * stride,
        COUNTS + tl.maximum(counts, 0).to(tl.int64) * counts_stride,
        counts >= 0,
        tl.load(FLOATS + REPETITION),
        tl.load(FLOATS + INVERSE),
        tl.load(FLOATS + FREQUENCY),
        tl.load(FLOATS + PRESENCE),
        tl.load(LINE + VOCAB),
        width,
    )


@triton.jit
def spread_of(LINE, LEVELS):
    FLOATS = floats_of(LINE)
    return tl.load(LEVELS + BEST_LOGIT), tl.load(FLOATS + SCALE), tl.load(FLOATS + REACH)


@triton.jit
def load_logits(source, ids, HAS_COUNTS: tl.constexpr):
    """The row's logits at `ids` after penalties; -inf beyond its vocabulary."""
    LOGITS_V, COUNTS_V, counted, repetition, inverse, frequency, presence, vocab, width = source
    # The mask is by the tensor's width, which is a multiple of 16 where wide loads are possible at all.
    inside = ids < width
    logits = tl.load(LOGITS_V + ids, mask=inside, other=float("-inf"))
    if HAS_COUNTS and counted:
        count = tl.load(COUNTS_V + ids, mask=inside, other=0)
        repeated = logits * tl.where(logits > 0, inverse, repetition)
        logits = tl.where(count > 0, repeated, logits)
        generated = count // COUNT_STEP
        logits = logits - frequency * generated.to(tl.float32)
        logits = logits - presence * tl.where(generated > 0, 1.0, 0.0)
    return tl.where(ids < vocab, logits, float("-inf"))


@triton.jit
def count_token(source, token, HAS_COUNTS: tl.constexpr):
    if HAS_COUNTS and source[2]:
        tl.store(source[1] + token, tl.load(source[1] + token) + COUNT_STEP)


@triton.jit
def weigh(logits, spread, BINS: tl.constexpr):
    """(weights, bins). Weight 0: left out, by min-p or for being too small. Bins ascend as logits descend."""
    best, scale, reach = spread
    octaves = (best - logits) * scale
    within = octaves <= reach
    octaves = tl.minimum(octaves, OCTAVES + 1.0)
    whole = octaves.to(tl.int32)
    fraction = octaves - whole.to(tl.float32)
    power = _H5 * fraction + _H4
    power = power * fraction + _H3
    power = power * fraction + _H2
    power = power * fraction + _H1
    power = power * fraction + _H0
    power = power * fraction + 1.0
    unit = ((-whole + (OCTAVES + 127)) << 23).to(tl.float32, bitcast=True)
    bins = tl.minimum((octaves * BINS_PER_OCTAVE).to(tl.int32), BINS - 1)
    return tl.where(within, (power * unit).to(tl.int64), 0), bins


@triton.jit
def key_of(logits):
    """int64 that are ordered as the float32s are, -0 and 0 alike."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def logit_of(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def share_of(numerator, mass, UP: tl.constexpr):
    """`reference.scaled`."""
    wide = numerator.to(tl.int64)
    product = wide * (mass & FRACTION_MASK)
    if UP:
        product += FRACTION_MASK
    return wide * (mass >> FRACTION_BITS) + (product >> FRACTION_BITS)


@triton.jit
def is_last(TICKETS_X, stage: tl.constexpr):
    """Whether every other program of the row has finished this stage. Each calls it once, behind all that it writes."""
    tl.debug_barrier()
    last = tl.atomic_add(TICKETS_X + stage, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(TICKETS_X + stage, 0)
    return last
