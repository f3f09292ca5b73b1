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

from kernels.rotary.triton_rope_cache import head_rows, turned_rows

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
def _tile(
    CACHE, blocks, tokens, stop,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys or values of some tokens, zeros from stop on. `blocks`: where theirs begin."""
    d = tl.arange(0, DP)
    at = (blocks + within_block(tokens, BLOCK) * D)[:, None] + d[None, :]
    return tl.load(CACHE + at, mask=(tokens < stop)[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _attend(
    q, acc, peak, totals, k, v, KEYS, VALUES, TABLE, blocks, start, stop, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """The query heads of one K/V head, as rows of matrix products, over tokens start:stop.

    Args:
        q: [GP, DP].
        acc, peak, totals: float32 [GP, DP], [GP], [GP, TILE], sums so far: of exp2(score - peak) v, the highest score,
            weights, in any column.
        HELD: k and v of the first tile are in registers, as those of the next are while one is multiplied; `blocks` are
            of the second. Else loads are stages of Triton's pipeline, and `blocks` are of the first.
    """
    tile = tl.arange(0, TILE)
    # Not tl.range(num_stages=...): that would turn the table's loads into stages of the pipeline too, and make each
    # tile's wait for them. As it is, entries are in registers one tile ahead of the loads that they lead to.
    for first in range(start, stop, TILE):
        tokens = first + tile
        ahead = tokens + TILE
        here = blocks
        if HELD:
            blocks = block_offsets(TABLE, ahead + TILE, ahead + TILE < stop, BLOCK, STRIDE)
            keys = k
        else:
            blocks = block_offsets(TABLE, ahead, ahead < stop, BLOCK, STRIDE)
            keys = _tile(KEYS, here, tokens, stop, D, DP, BLOCK)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if HELD:
            k = _tile(KEYS, here, ahead, stop, D, DP, BLOCK)
        scores = tl.where((tokens < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        peak = higher
        # Summed over tokens at the end: here it would cost the warps a meeting.
        totals = totals * fade[:, None] + p
        if HELD:
            values = v
        else:
            values = _tile(VALUES, here, tokens, stop, D, DP, BLOCK)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        if HELD:
            v = _tile(VALUES, here, ahead, stop, D, DP, BLOCK)
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


@triton.jit
def _repeated(x, GP: tl.constexpr):
    """[GP, n]: the rows of x [RP, n] again and again."""
    RP: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[None, :, :], (GP // RP, RP, n)), (GP, n))


@triton.jit
def _turned(
    CACHE, BASE, DELTA, SLAB, STARTS, COS, SIN, row, entry, slot, head, holds, sequences, scale, eps, bias, q_norm,
    k_norm,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, RP: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """From what the linear left: q, and of the row's own token acc and peak, as `_attend` has them. Its key and value
    go to the cache. Where they are another program's, acc is zero and peak -inf. Rows from RP on repeat.

    holds: the row's own token is among this program's.
    """
    TOTAL: tl.constexpr = (GROUP + 2) * KV_HEADS
    r = tl.arange(0, RP)[:, None]
    one = tl.arange(0, 1)[:, None]
    d = tl.arange(0, DP)[None, :]
    kind = CACHE.dtype.element_ty
    q = turned_rows(
        BASE, DELTA, SLAB, STARTS, COS, SIN, row, entry, head * GROUP + r, d, (r < GROUP) & (d < D), sequences, eps,
        bias, q_norm, TOTAL, D, SPLIT, HAS_DELTA, HAS_BIAS, HAS_NORM,
    ).to(kind)  # fmt: skip
    acc = tl.zeros((1, DP), tl.float32)
    peak = tl.full((RP,), float("-inf"), tl.float32)
    if holds:
        mine = (one == 0) & (d < D)
        k_head = one + KV_HEADS * GROUP + head
        k = turned_rows(
            BASE, DELTA, SLAB, STARTS, COS, SIN, row, entry, k_head, d, mine, sequences, eps, bias, k_norm,
            TOTAL, D, SPLIT, HAS_DELTA, HAS_BIAS, HAS_NORM,
        ).to(kind)  # fmt: skip
        v = head_rows(
            BASE, DELTA, SLAB, STARTS, row, entry, k_head + KV_HEADS, d, mine, sequences, bias, TOTAL, D, SPLIT,
            HAS_DELTA, HAS_BIAS,
        ).to(kind)  # fmt: skip
        to_key = CACHE + ((slot // BLOCK * (2 * KV_HEADS) + head) * BLOCK + slot % BLOCK) * D + d
        tl.store(to_key, k, mask=mine)
        tl.store(to_key + KV_HEADS * BLOCK * D, v, mask=mine)
        peak = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        acc = v.to(tl.float32)
    peaks = tl.reshape(_repeated(peak[:, None], GP), (GP,))
    return _repeated(q, GP), _repeated(acc, GP), peaks


@triton.jit
def _unit(
    Q, CACHE, TABLES, CONTEXTS, OUT, PARTIAL, STATS, ARRIVED,
    BASE, DELTA, SLAB, STARTS, ENTRY, COS, SIN, SLOTS, eps, bias, q_norm, k_norm,
    row, head, split, first, few, sequences, table_width, window, chunk, most, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, HELD: tl.constexpr,
    TURN: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One split of one row's context for one K/V head; nothing where it is beyond the context's splits.

    first: whether it is the program's first. few: whether all of its tokens may be asked for at once.
    """
    STRIDE: tl.constexpr = 2 * KV_HEADS * BLOCK * D
    context = tl.load(CONTEXTS + row)
    seen = tl.minimum(context, window)
    length = split_length(seen, chunk, most, TILE)
    splits = tl.maximum(tl.cdiv(seen, length), 1)
    if split < splits:
        start = context - seen + split * length
        stop = tl.minimum(start + length, context)
        holds = (stop == context) & (context > 0)
        entry = 0
        slot = 0
        if TURN:
            # The row's own token is not in the cache yet; all others are from earlier steps.
            stop = tl.minimum(stop, context - 1)
            entry = tl.load(ENTRY + row)
            slot = tl.load(SLOTS + row).to(tl.int64)
        pair = row.to(tl.int64) * KV_HEADS + head
        keys = CACHE + head * (BLOCK * D)
        values = keys + KV_HEADS * BLOCK * D
        table = TABLES + row.to(tl.int64) * table_width
        tokens = start + tl.arange(0, TILE)
        blocks = block_offsets(table, tokens, tokens < stop, BLOCK, STRIDE)
        second = blocks
        if HELD:
            second = block_offsets(table, tokens + TILE, tokens + TILE < stop, BLOCK, STRIDE)
        # Contexts and block tables are the step's input; q, and K and V of its tokens, come from the kernel before.
        if PDL and not (HELD and TURN):
            if first:
                if D == DP and D >= 64:
                    end = tl.minimum(stop, start + tl.where(few, _AHEAD, TILE))
                    _request(keys, table, start, end, D, BLOCK, STRIDE, TILE, KV_HEADS * BLOCK * D)
                gdc_wait()
        k = 0.0
        v = 0.0
        if HELD:
            k = _tile(keys, blocks, tokens, stop, D, DP, BLOCK)
            v = _tile(values, blocks, tokens, stop, D, DP, BLOCK)
            if PDL and TURN:
                if first:
                    gdc_wait()
        r = tl.arange(0, GP)
        d = tl.arange(0, DP)
        at = r[:, None] * D + d[None, :]
        mask = (r[:, None] < GROUP) & (d[None, :] < D)
        totals = tl.zeros((GP, TILE), tl.float32)
        if TURN:
            q, acc, peak = _turned(
                CACHE, BASE, DELTA, SLAB, STARTS, COS, SIN, row, entry, slot, head, holds, sequences, scale, eps, bias,
                q_norm, k_norm, KV_HEADS, GROUP, GP, D, DP, BLOCK, RP, SPLIT, HAS_DELTA, HAS_BIAS, HAS_NORM,
            )  # fmt: skip
            totals += tl.where((tl.arange(0, TILE)[None, :] == 0) & (holds | (r[:, None] < 0)), 1.0, 0.0)
        else:
            q = tl.load(Q + pair * (GROUP * D) + at, mask=mask, other=0.0)
            acc = tl.zeros((GP, DP), tl.float32)
            peak = tl.full((GP,), float("-inf"), tl.float32)
        acc, peak, total = _attend(
            q, acc, peak, totals, k, v, keys, values, table, second, start, stop, scale, D, DP, BLOCK, STRIDE, TILE,
            HELD,
        )  # fmt: skip
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


@triton.jit(do_not_specialize=["sequences", "table_width", "window", "chunk", "most", "bias", "q_norm", "k_norm"])
def decode_kernel(
    Q, CACHE, TABLES, CONTEXTS, OUT, PARTIAL, STATS, ARRIVED,
    BASE, DELTA, SLAB, STARTS, ENTRY, COS, SIN, SLOTS, eps, bias, q_norm, k_norm,
    sequences, table_width, window, chunk, most, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr,
    DIRECT: tl.constexpr, HELD: tl.constexpr,
    TURN: tl.constexpr, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """
    Args:
        Q, OUT: [sequences, KV_HEADS * GROUP, D]. Q: unless TURN.
        PARTIAL: float32 [sequences, KV_HEADS, most, GROUP, D], sums not yet divided by their weights.
        STATS: float32 [sequences, KV_HEADS, most, 2, GROUP], highest score and sum of weights.
        ARRIVED: [sequences, KV_HEADS], zero before and after.
        BASE .. k_norm, SPLIT, HAS_DELTA, HAS_BIAS, HAS_NORM: as `rope_cache_kernel` has them, if TURN.
        window: how many tokens a row sees.
        chunk, most: see `split_length`.
        scale: of scores, times log2(e).
        ROWS, RP, DP: powers of two, at least sequences, GROUP, D. GP: RP, but at least 16. STEP: splits added at once.
        DIRECT: grid (KV_HEADS, sequences, most), a unit or none each; else programs take units in turn.
        HELD: see `_attend`.
    """
    if PDL:
        gdc_launch_dependents()
    if DIRECT:
        _unit(
            Q, CACHE, TABLES, CONTEXTS, OUT, PARTIAL, STATS, ARRIVED, BASE, DELTA, SLAB, STARTS, ENTRY, COS, SIN, SLOTS,
            eps, bias, q_norm, k_norm, tl.program_id(1), tl.program_id(0), tl.program_id(2), True, True, sequences,
            table_width, window, chunk, most, scale, KV_HEADS, GROUP, GP, D, DP, BLOCK, TILE, RP, STEP, HELD, TURN,
            SPLIT, HAS_DELTA, HAS_BIAS, HAS_NORM, PDL,
        )  # fmt: skip
    else:
        rows = tl.arange(0, ROWS)
        seens = tl.minimum(tl.load(CONTEXTS + rows, mask=rows < sequences, other=0), window)
        counts = tl.maximum(tl.cdiv(seens, split_length(seens, chunk, most, TILE)), 1)
        ends = tl.cumsum(tl.where(rows < sequences, counts, 0), 0)
        units = tl.max(ends, 0) * KV_HEADS
        for unit in range(tl.program_id(0), units, tl.num_programs(0)):
            index = unit // KV_HEADS
            row = tl.sum((ends <= index).to(tl.int32), 0)
            split = index - tl.max(tl.where(ends <= index, ends, 0), 0)
            _unit(
                Q, CACHE, TABLES, CONTEXTS, OUT, PARTIAL, STATS, ARRIVED, BASE, DELTA, SLAB, STARTS, ENTRY, COS, SIN,
                SLOTS, eps, bias, q_norm, k_norm, row, unit % KV_HEADS, split, unit == tl.program_id(0),
                units <= _FEW_UNITS, sequences, table_width, window, chunk, most, scale, KV_HEADS, GROUP, GP, D, DP,
                BLOCK, TILE, RP, STEP, HELD, TURN, SPLIT, HAS_DELTA, HAS_BIAS, HAS_NORM, PDL,
            )  # fmt: skip
