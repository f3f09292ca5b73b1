"""The kernel behind `device.embed`."""

# Triton's language is not Python's types:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from kernels.device import FIELDS, UNIT, Field

_FIELDS = tl.constexpr(FIELDS)
_UNIT = tl.constexpr(UNIT)
_SIGN = tl.constexpr(int(Field.SIGN))
_SCALE = tl.constexpr(int(Field.SCALE))
_PLANES = tl.constexpr(int(Field.PLANES))
_COL = tl.constexpr(int(Field.COL))
_ZERO = tl.constexpr(int(Field.ZERO))
_LORA_A = tl.constexpr(int(Field.LORA_A))
_LORA_B = tl.constexpr(int(Field.LORA_B))
_RANK = tl.constexpr(int(Field.RANK))
_DENSE = tl.constexpr(int(Field.DENSE))
_ROW_INDEX = tl.constexpr(int(Field.ROW_INDEX))
_ROW_VALUE = tl.constexpr(int(Field.ROW_VALUE))
_ROWS = tl.constexpr(int(Field.ROWS))
_OUTPUTS = tl.constexpr(int(Field.OUTPUTS))
_PIVOTS = tl.constexpr(1024)


@triton.jit
def _part(SLAB, offset):
    """Where a part begins, in a slab seen as its dtype."""
    return SLAB + offset.to(tl.int64) * (_UNIT * 8 // SLAB.dtype.element_ty.primitive_bitwidth)


@triton.jit
def _sign_row(
    INTS, FLOATS, FIELD, token, outputs, which, BLOCKS: tl.constexpr, KS: tl.constexpr, COLUMNS: tl.constexpr
):
    """float32 [KS]: columns which * KS on of row `token` of all sign planes. Of each tile of bits, 8 words."""
    high = (outputs + 15) // 16
    words = which * (KS // 32) + tl.arange(0, KS // 32)
    block, word = words // 8, words % 8
    # Lane 4 g + q holds columns 32 (q + 4 (c // 2)) of row g + 8 (c % 2) in its word c.
    in_tile = (token % 8 * 4 + word % 4) * 4 + token % 16 // 8 + word // 4 * 2
    k = which * KS + tl.arange(0, KS)
    TILES = _part(INTS, tl.load(FIELD + _SIGN))
    SCALES = _part(FLOATS, tl.load(FIELD + _SCALE)) + token
    col = tl.load(FIELD + _COL)
    zero = tl.load(FIELD + _ZERO)
    row = tl.zeros((KS,), tl.float32)
    for p in range(tl.load(FIELD + _PLANES)):
        tile = (p * high + token // 16).to(tl.int64) * BLOCKS + block
        bits = tl.load(TILES + tile * 128 + in_tile, mask=block < BLOCKS, other=0)
        ones = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, (KS,))
        plane = (2 * ones - 1).to(tl.float32) * tl.load(SCALES + p * high * 16)
        if COLUMNS:
            width = tl.where(col >= 0, BLOCKS * 256, 0)
            plane *= tl.load(_part(FLOATS, col) + p * BLOCKS * 256 + k, mask=k < width, other=1.0)
        row += plane
    return row + tl.load(_part(FLOATS, zero) + token, mask=zero >= 0, other=0.0)


@triton.jit
def _low_rank_row(VALUES, FIELD, token, k, rank, K: tl.constexpr, KS: tl.constexpr):
    """float32 [KS]: columns k of B[token] A."""
    A = _part(VALUES, tl.load(FIELD + _LORA_A))
    B = _part(VALUES, tl.load(FIELD + _LORA_B)) + token.to(tl.int64) * rank
    row = tl.zeros((KS,), tl.float32)
    for first in range(0, rank, 16):
        r = first + tl.arange(0, 16)
        b = tl.load(B + r).to(tl.float32)
        at = r[:, None].to(tl.int64) * K + k[None, :]
        a = tl.load(A + at, mask=(k < K)[None, :], other=0.0).to(tl.float32)
        row += tl.sum(b[:, None] * a, 0)
    return row


@triton.jit
def _byte_row(BYTES, FIELD, token, k, rank, K: tl.constexpr, KS: tl.constexpr):
    """The same of factors of bytes, whose scales stand behind A. Its loads are far ahead of what they are added to."""
    A = _part(BYTES, tl.load(FIELD + _LORA_A))
    SCALES = (A + rank.to(tl.int64) * K).to(tl.pointer_type(tl.float32), bitcast=True)
    B = _part(BYTES, tl.load(FIELD + _LORA_B)) + token.to(tl.int64) * rank
    row = tl.zeros((KS,), tl.float32)
    for first in tl.range(0, rank, 16, num_stages=3):
        r = first + tl.arange(0, 16)
        b = tl.load(B + r).to(tl.float32) * tl.load(SCALES + r)
        at = r[:, None].to(tl.int64) * K + k[None, :]
        a = tl.load(A + at, mask=(k < K)[None, :], other=0).to(tl.float32)
        row += tl.sum(b[:, None] * a, 0)
    return row


@triton.jit
def _replaced(INTS, FIELD, token):
    """Which of the entry's replaced rows has the token, or -1. Every step-th index finds the stretch that may have it,
    then all of that stretch: two loads on a critical path where bisection has one for each halving."""
    count = tl.load(FIELD + _ROWS)
    INDEX = _part(INTS, tl.load(FIELD + _ROW_INDEX))
    i = tl.arange(0, _PIVOTS)
    step = (count + _PIVOTS - 1) // _PIVOTS
    pivots = tl.load(INDEX + i * step, mask=i * step < count, other=2147483647)
    begin = tl.maximum(tl.sum((pivots <= token).to(tl.int32), 0) - 1, 0) * step
    found = tl.full((), -1, tl.int32)
    for at in range(begin, tl.minimum(begin + step, count), _PIVOTS):
        hit = tl.load(INDEX + at + i, mask=at + i < count, other=-1) == token
        found = tl.maximum(found, tl.max(tl.where(hit, at + i, -1), 0))
    return found


@triton.jit(do_not_specialize=["vocabulary", "target", "targets"])
def embed_kernel(
    TOKENS, SOURCE, SAMPLED, WEIGHT, VALUES, FLOATS, INTS, TABLE, ENTRY, OUT, vocabulary, target, targets,
    K: tl.constexpr, KS: tl.constexpr, SIGNS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    BYTES: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, which): columns which * KS on.

    Args:
        VALUES, FLOATS, INTS: the slab as the compute dtype, float32 and int32. RANK, ..: kinds that rows may have.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    which = tl.program_id(1)
    k = which * KS + tl.arange(0, KS)
    # Loads that need each other are what takes time here: two chains of them, side by side.
    entry = tl.load(ENTRY + row)
    FIELD = TABLE + (entry * targets + target) * _FIELDS
    own = tl.load(FIELD + _OUTPUTS)
    token = tl.load(TOKENS + row).to(tl.int32)
    source = tl.load(SOURCE + row)
    token = tl.where(
        source >= 0, tl.load(SAMPLED + tl.maximum(source, 0), mask=source >= 0, other=0).to(tl.int32), token
    )
    at = token.to(tl.int64) * K + k
    x = tl.load(WEIGHT + at, mask=k < tl.where(token < vocabulary, K, 0), other=0.0).to(tl.float32)
    outputs = tl.where(own > 0, own, vocabulary)
    if SIGNS and tl.load(FIELD + _PLANES) > 0:
        x += _sign_row(INTS, FLOATS, FIELD, token, outputs, which, (K + 255) // 256, KS, COLUMNS)
    if RANK and token < vocabulary:
        rank = tl.load(FIELD + _RANK)
        if BYTES and rank % 2 == 1:
            SMALL = INTS.to(tl.pointer_type(tl.int8), bitcast=True)
            x += _byte_row(SMALL, FIELD, token, k, rank // 16 * 16, K, KS)
        else:
            x += _low_rank_row(VALUES, FIELD, token, k, rank, K, KS)
    if DENSE:
        dense = tl.load(FIELD + _DENSE)
        x += tl.load(_part(VALUES, dense) + at, mask=k < tl.where(dense >= 0, K, 0), other=0.0).to(tl.float32)
    if ROWS:
        found = _replaced(INTS, FIELD, token)
        if found >= 0:
            VALUE = _part(VALUES, tl.load(FIELD + _ROW_VALUE)) + found.to(tl.int64) * K
            x = tl.load(VALUE + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(OUT + row.to(tl.int64) * K + k, x.to(OUT.dtype.element_ty), mask=k < K)
