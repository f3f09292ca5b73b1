"""Causal attention of prompt chunks over the paged cache, their own keys and values included.

A tile is BM rows of a matrix product: consecutive positions of one sequence, each with all query heads of one K/V
head, so that keys and values are read once for the group. Tiles of keys begin at multiples of BN from position 0 on,
however a prompt is cut into chunks. Only those that the diagonal or the window's edge crosses are masked, and none
beyond them are visited. (FlashAttention-2, Dao 2023.)

A few rows after a long prefix are few tiles: then several programs share the keys of each, and the one that finishes
last adds up, in order, as in `triton_decode`.
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.paged_attention.triton_decode import block_offsets, within_block


@triton.jit
def _scan(
    acc, peak, total, q, KEYS, VALUES, TABLE, start, stop, context, positions, window, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr,
    WINDOWED: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running softmax over tokens start:stop; nothing at or beyond `context` is read.

    MASKED: some rows do not see some of the tokens. Where not, stop is at most `context`.
    """
    d = tl.arange(0, DP)
    tile = tl.arange(0, BN)
    blocks = block_offsets(TABLE, start + tile, start + tile < tl.minimum(stop, context), BLOCK, STRIDE)
    for first in range(start, stop, BN):
        tokens = first + tile
        at = (blocks + within_block(tokens, BLOCK) * D)[:, None] + d[None, :]
        following = tokens + BN
        blocks = block_offsets(TABLE, following, following < tl.minimum(stop, context), BLOCK, STRIDE)
        if MASKED:
            there = (tokens < context)[:, None] & (d[None, :] < D)
        else:
            there = (tokens >= 0)[:, None] & (d[None, :] < D)
        k = tl.load(KEYS + at, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = tokens[None, :] <= positions[:, None]
            if WINDOWED:
                visible = visible & (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = higher
        if MASKED and (WINDOWED or SPLIT):
            # A row may see nothing of the first tiles that its neighbours see.
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores * scale - base[:, None])
        fade = tl.exp2(peak - base)
        peak = higher
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        v = tl.load(VALUES + at, mask=there, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, peak, total


@triton.jit
def _combine(PARTIAL, STATS, splits, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """The sums of one tile, from PARTIAL [splits, BM, D] and STATS [splits, 2, BM]. Returns acc and total.

    Loads go past the first-level cache: other programs wrote what they read.
    """
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    for s in range(splits):
        highest = tl.maximum(highest, tl.load(STATS + s * (2 * BM) + m, cache_modifier=".cg"))
    acc = tl.zeros((BM, DP), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for s in range(splits):
        weight = tl.exp2(tl.load(STATS + s * (2 * BM) + m, cache_modifier=".cg") - highest)
        total += weight * tl.load(STATS + s * (2 * BM) + BM + m, cache_modifier=".cg")
        at = (s * BM + m)[:, None] * D + d[None, :]
        acc += weight[:, None] * tl.load(PARTIAL + at, mask=d[None, :] < D, other=0.0, cache_modifier=".cg")
    return acc, total


@triton.jit(do_not_specialize=["sequences", "table_width", "window", "most", "least"])
def prefill_kernel(
    Q, CACHE, TABLES, STARTS, CONTEXTS, OUT, PARTIAL, STATS, ARRIVED, sequences, table_width, window, most, least,
    scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, at least as many as there are tiles, most).

    Args:
        Q, OUT: [rows, KV_HEADS * GROUP, D].
        STARTS: [sequences + 1], rows of each sequence: the last ones of its context.
        PARTIAL, STATS: float32 [tiles, KV_HEADS, most, BM, D] and [tiles, KV_HEADS, most, 2, BM], if SPLIT.
        ARRIVED: [tiles, KV_HEADS], zero before and after, if SPLIT.
        most, least: programs for the keys of a tile, and tiles of keys for each of them.
        scale: of scores, times log2(e).
        ROWS, DP: powers of two, at least sequences and D.
    """
    STRIDE: tl.constexpr = 2 * KV_HEADS * BLOCK * D
    STEP: tl.constexpr = BM // GROUP
    head = tl.program_id(0)
    s = tl.arange(0, ROWS)
    starts = tl.load(STARTS + s, mask=s < sequences, other=0)
    counts = tl.load(STARTS + s + 1, mask=s < sequences, other=0) - starts
    ends = tl.cumsum(tl.cdiv(counts, STEP), 0)
    # The last tiles see the most: they begin first.
    tile = tl.max(ends, 0) - 1 - tl.program_id(1)
    if tile < 0:
        return
    sequence = tl.sum((ends <= tile).to(tl.int32), 0)
    offset = (tile - tl.max(tl.where(ends <= tile, ends, 0), 0)) * STEP
    start = tl.load(STARTS + sequence)
    count = tl.load(STARTS + sequence + 1) - start
    before = tl.load(CONTEXTS + sequence) - count
    lowest = before + offset
    highest = before + tl.minimum(offset + STEP, count) - 1
    stop = highest + 1
    first = 0
    whole = 0  # tiles from here to the diagonal are seen by every row
    if WINDOWED:
        first = tl.maximum(lowest - window + 1, 0) // BN * BN
        whole = tl.cdiv(tl.maximum(highest - window + 1, 0), BN) * BN
    diagonal = tl.maximum((lowest + 1) // BN * BN, whole)
    begin = first
    end = stop
    splits = 1
    if SPLIT:
        tiles = tl.cdiv(stop - first, BN)
        share = tl.maximum(tl.cdiv(tiles, most), least)
        splits = tl.cdiv(tiles, share)
        begin = first + tl.program_id(2) * share * BN
        end = tl.minimum(begin + share * BN, stop)
        if begin >= stop:
            return
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    row = offset + m // GROUP
    positions = before + row
    live = (m < STEP * GROUP) & (row < count)
    at = ((start + row).to(tl.int64) * KV_HEADS + head) * (GROUP * D) + (m % GROUP) * D
    at = at[:, None] + d[None, :]
    mask = live[:, None] & (d[None, :] < D)
    q = tl.load(Q + at, mask=mask, other=0.0)
    keys = CACHE + head * (BLOCK * D)
    values = keys + KV_HEADS * BLOCK * D
    table = TABLES + sequence.to(tl.int64) * table_width
    acc = tl.zeros((BM, DP), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if WINDOWED:
        acc, peak, total = _scan(
            acc, peak, total, q, keys, values, table, begin, tl.minimum(whole, end), stop, positions, window, scale,
            D, DP, BLOCK, STRIDE, BN, WINDOWED, SPLIT, True,
        )  # fmt: skip
    acc, peak, total = _scan(
        acc, peak, total, q, keys, values, table, tl.maximum(whole, begin), tl.minimum(diagonal, end), stop, positions,
        window, scale, D, DP, BLOCK, STRIDE, BN, WINDOWED, SPLIT, False,
    )  # fmt: skip
    acc, peak, total = _scan(
        acc, peak, total, q, keys, values, table, tl.maximum(diagonal, begin), end, stop, positions, window, scale,
        D, DP, BLOCK, STRIDE, BN, WINDOWED, SPLIT, True,
    )  # fmt: skip
    if SPLIT:
        if splits > 1:
            pair = tile * KV_HEADS + head
            partial = PARTIAL + pair.to(tl.int64) * most * (BM * D)
            stats = STATS + pair.to(tl.int64) * most * (2 * BM)
            split = tl.program_id(2)
            tl.store(partial + (split * BM + m)[:, None] * D + d[None, :], acc, mask=d[None, :] < D)
            tl.store(stats + split * (2 * BM) + m, peak)
            tl.store(stats + split * (2 * BM) + BM + m, total)
            tl.debug_barrier()
            if tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel", scope="gpu") < splits - 1:
                return
            tl.store(ARRIVED + pair, 0)
            acc, total = _combine(partial, stats, splits, D, DP, BM)
    tl.store(OUT + at, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=mask)
