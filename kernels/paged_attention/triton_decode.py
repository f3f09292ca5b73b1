"""Attention of single rows over the paged cache, in pieces of one row's context.

A *unit* is one split of one row's context for one K/V head. How a context is cut depends on that context and on the
launch's configuration, never on the other rows. Programs take units in turn, so that rows of any lengths fill a device
evenly and a context that is short, or none, costs one unit; which program computes a unit changes no bit of it.

Splits of a row meet through a counter for each (row, head): the program that finishes last adds them up, in order, and
sets the counter back to zero for the next launch. (Split-KV: Flash-Decoding, Dao et al. 2023.)
"""

# Triton's language is not Python's:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FEW_UNITS = tl.constexpr(512)
_AHEAD = tl.constexpr(128)
"""So many tokens of each unit are requested before the kernel before has ended, if units are few: at most 32 MiB, which
the second-level cache holds. Where they are more, a tile."""


@triton.jit
def block_offsets(TABLE, tokens, mask, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """int64: where in the cache each token's block begins, in elements. No entry is read where the mask is not set."""
    index = (tokens.to(tl.uint32) // BLOCK).to(tl.int32)
    return tl.load(TABLE + index, mask=mask, other=0).to(tl.int64) * STRIDE


@triton.jit
def within_block(tokens, BLOCK: tl.constexpr):
    return (tokens.to(tl.uint32) % BLOCK).to(tl.int32)


@triton.jit
def split_length(seen, chunk, most, TILE: tl.constexpr):
    """Tokens in each split of `seen` visible ones: whole tiles, about `chunk`, more where that gives over `most`."""
    splits = tl.maximum(tl.minimum(tl.cdiv(seen, chunk), most), 1)
    return tl.maximum(tl.cdiv(tl.cdiv(seen, splits), TILE), 1) * TILE


@triton.jit
def _attend(
    Q, KEYS, VALUES, TABLE, blocks, start, stop, scale,
    GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The query heads of one K/V head, as rows of matrix products, over tokens start:stop. `blocks`: of the first tile.

    Returns float32 acc [GP, DP], peak [GP], total [GP]: sum of exp2(score - peak) v, highest score, sum of weights.
    """
    r = tl.arange(0, GP)
    d = tl.arange(0, DP)
    q = tl.load(Q + r[:, None] * D + d[None, :], mask=(r[:, None] < GROUP) & (d[None, :] < D), other=0.0)
    acc = tl.zeros((GP, DP), tl.float32)
    peak = tl.full((GP,), float("-inf"), tl.float32)
    totals = tl.zeros((GP, TILE), tl.float32)
    tile = tl.arange(0, TILE)
    # Not tl.range(num_stages=...): that would turn the table's loads into stages of the pipeline too, and make each
    # tile's wait for them. As it is, entries are in registers one tile ahead of the loads that they lead to.
    for first in range(start, stop, TILE):
        tokens = first + tile
        live = tokens < stop
        at = (blocks + within_block(tokens, BLOCK) * D)[:, None] + d[None, :]
        blocks = block_offsets(TABLE, tokens + TILE, tokens + TILE < stop, BLOCK, STRIDE)
        k = tl.load(KEYS + at, mask=live[:, None] & (d[None, :] < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(live[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        peak = higher
        # Summed over tokens at the end: here it would cost the warps a meeting.
        totals = totals * fade[:, None] + p
        v = tl.load(VALUES + at, mask=live[:, None] & (d[None, :] < D), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, peak, tl.sum(totals, 1)


@triton.jit
def _request(
    KEYS, TABLE, start, stop, D: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
    VALUES_AT: tl.constexpr,
):  # fmt: skip
    """Ask for keys and values of tokens start:stop, for the second-level cache. Nothing is read: the last token may
    yet be written. For tokens from stop on, block 0 is asked for."""
    PIECES: tl.constexpr = D * KEYS.dtype.element_ty.primitive_bitwidth // 512
    piece = tl.arange(0, 2 * PIECES)
    within = piece // PIECES * VALUES_AT + piece % PIECES * (D // PIECES)
    for first in range(start, stop, TILE):
        tokens = first + tl.arange(0, TILE)
        at = block_offsets(TABLE, tokens, tokens < stop, BLOCK, STRIDE) + within_block(tokens, BLOCK) * D
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1];\nmov.u32 $0, 0;", "=r,l", [(KEYS + at[:, None] + within[None, :]).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _combine(
    OUT, PARTIAL, STATS, splits,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add the splits of one row and head, STEP of them in one round trip. Loads go past the first-level cache: other
    programs wrote what they read."""
    r = tl.arange(0, RP)
    d = tl.arange(0, DP)
    acc = tl.zeros((RP, DP), tl.float32)
    total = tl.zeros((RP,), tl.float32)
    highest = tl.full((RP,), float("-inf"), tl.float32)
    for first in range(0, splits, STEP):
        some = (first + tl.arange(0, STEP))[:, None]
        there = (some < splits) & (r[None, :] < GROUP)
        at = STATS + some * (2 * GROUP) + r[None, :]
        peaks = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(at + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        part = tl.load(
            PARTIAL + (some * GROUP + r[None, :])[:, :, None] * D + d[None, None, :],
            mask=there[:, :, None] & (d[None, None, :] < D), other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.where(r < GROUP, tl.maximum(highest, tl.max(peaks, 0)), 0.0)
        fade = tl.exp2(highest - higher)
        weights = tl.exp2(peaks - higher[None, :])
        total = total * fade + tl.sum(totals * weights, 0)
        acc = acc * fade[:, None] + tl.sum(part * weights[:, :, None], 0)
        highest = higher
    out = acc / tl.where(r < GROUP, total, 1.0)[:, None]
    mask = (r[:, None] < GROUP) & (d[None, :] < D)
    tl.store(OUT + r[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["sequences", "table_width", "window", "chunk", "most"])
def decode_kernel(
    Q, CACHE, TABLES, CONTEXTS, OUT, PARTIAL, STATS, ARRIVED, sequences, table_width, window, chunk, most, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """
    Args:
        Q, OUT: [sequences, KV_HEADS * GROUP, D].
        PARTIAL: float32 [sequences, KV_HEADS, most, GROUP, D], sums not yet divided by their weights.
        STATS: float32 [sequences, KV_HEADS, most, 2, GROUP], highest score and sum of weights.
        ARRIVED: [sequences, KV_HEADS], zero before and after.
        window: how many tokens a row sees.
        chunk, most: see `split_length`.
        scale: of scores, times log2(e).
        ROWS, RP, DP: powers of two, at least sequences, GROUP, D. GP: RP, but at least 16. STEP: splits added at once.
    """
    if PDL:
        gdc_launch_dependents()
    STRIDE: tl.constexpr = 2 * KV_HEADS * BLOCK * D
    rows = tl.arange(0, ROWS)
    seens = tl.minimum(tl.load(CONTEXTS + rows, mask=rows < sequences, other=0), window)
    counts = tl.maximum(tl.cdiv(seens, split_length(seens, chunk, most, TILE)), 1)
    ends = tl.cumsum(tl.where(rows < sequences, counts, 0), 0)
    units = tl.max(ends, 0) * KV_HEADS
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        head = unit % KV_HEADS
        index = unit // KV_HEADS
        row = tl.sum((ends <= index).to(tl.int32), 0)
        split = index - tl.max(tl.where(ends <= index, ends, 0), 0)
        context = tl.load(CONTEXTS + row)
        seen = tl.minimum(context, window)
        length = split_length(seen, chunk, most, TILE)
        splits = tl.maximum(tl.cdiv(seen, length), 1)
        start = context - seen + split * length
        stop = tl.minimum(start + length, context)
        pair = row.to(tl.int64) * KV_HEADS + head
        query = Q + pair * (GROUP * D)
        keys = CACHE + head * (BLOCK * D)
        values = keys + KV_HEADS * BLOCK * D
        table = TABLES + row.to(tl.int64) * table_width
        tokens = start + tl.arange(0, TILE)
        blocks = block_offsets(table, tokens, tokens < stop, BLOCK, STRIDE)
        if PDL:
            # Contexts and block tables are the step's input; q, and K and V of its tokens, the kernel before writes.
            if unit == tl.program_id(0):
                if D == DP and D >= 64:
                    end = tl.minimum(stop, start + tl.where(units <= _FEW_UNITS, _AHEAD, TILE))
                    _request(keys, table, start, end, D, BLOCK, STRIDE, TILE, KV_HEADS * BLOCK * D)
                gdc_wait()
        acc, peak, total = _attend(
            query, keys, values, table, blocks, start, stop, scale, GROUP, GP, D, DP, BLOCK, STRIDE, TILE
        )  # fmt: skip
        r = tl.arange(0, GP)
        d = tl.arange(0, DP)
        at = r[:, None] * D + d[None, :]
        mask = (r[:, None] < GROUP) & (d[None, :] < D)
        if splits == 1:
            # No context: nothing has been added, and nothing is the answer.
            out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(OUT + pair * (GROUP * D) + at, out.to(OUT.dtype.element_ty), mask=mask)
        else:
            partial = PARTIAL + pair * most * (GROUP * D)
            stats = STATS + pair * most * (2 * GROUP)
            tl.store(partial + split * (GROUP * D) + at, acc, mask=mask)
            tl.store(stats + split * (2 * GROUP) + r, peak, mask=r < GROUP)
            tl.store(stats + split * (2 * GROUP) + GROUP + r, total, mask=r < GROUP)
            # All threads' stores come before the count that announces them.
            tl.debug_barrier()
            if tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
                tl.store(ARRIVED + pair, 0)
                _combine(OUT + pair * (GROUP * D), partial, stats, splits, GROUP, D, DP, RP, STEP)
