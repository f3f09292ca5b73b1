"""Where top-k and top-p end, exactly and without a sort.

Bins are ordered as logits are, so the histogram says in which bin a threshold lies: about 1 % of weight wide, it holds
few tokens, which are listed and bisected by their keys. Should there be more of them than the list takes (a thousand
equal logits do no harm, ten thousand do), the whole row is searched instead: slow, but as exact.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sampling.triton_common import (
    CUT_ID,
    CUT_LOGIT,
    K_ABOVE,
    K_BIN,
    K_MASS,
    LAST_ID,
    LEVEL_WIDTH,
    LINE_WIDTH,
    LIST_LENGTH,
    LOWEST_KEY,
    P_FIRST,
    P_LAST,
    P_MASS,
    PENDING,
    STATE_WIDTH,
    TICKET_WIDTH,
    TOP_K,
    TOP_P,
    VOCAB,
    key_of,
    load_logits,
    logit_of,
    share_of,
    source_of,
    spread_of,
    weigh,
)

_BY_COUNT = tl.constexpr(0)
_BY_WEIGHT = tl.constexpr(1)
_BY_ID = tl.constexpr(2)


@triton.jit
def _find(HISTOGRAM_H, target, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """(first bin up to which the sum reaches the target, else BINS; the sum before it)"""
    found = tl.zeros_like(target)
    before = tl.zeros_like(target)
    total = tl.zeros_like(target)
    for start in range(0, BINS, CHUNK):
        here = tl.load(HISTOGRAM_H + start + tl.arange(0, CHUNK)).to(tl.int64)
        sums = total + tl.cumsum(here, 0)
        found += tl.sum((sums < target).to(tl.int64), 0)
        before = tl.maximum(before, tl.max(tl.where(sums < target, sums, 0), 0))
        total += tl.sum(here, 0)
    return found, before


@triton.jit
def _sum_before(HISTOGRAM_H, stop, BINS: tl.constexpr, CHUNK: tl.constexpr):
    total = tl.zeros_like(stop)
    for start in range(0, BINS, CHUNK):
        bins = start + tl.arange(0, CHUNK)
        total += tl.sum(tl.load(HISTOGRAM_H + bins, mask=bins < stop, other=0), 0)
    return total


@triton.jit
def bracket(STATES, HIST_COUNT_H, HIST_WEIGHT_H, top_k, top_p, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """In which bins top-k and top-p end. top-p is a share of what top-k leaves, which is known here but for the bin in
    which top-k ends; so top-p may end in any of the bins between those for the least and the most."""
    k_bin = top_k.to(tl.int64) * 0 + BINS
    if top_k > 0:
        k_bin, above = _find(HIST_COUNT_H, top_k.to(tl.int64), BINS, CHUNK)
        tl.store(STATES + K_ABOVE, above)
    tl.store(STATES + K_BIN, k_bin)
    if top_p > 0:
        least = _sum_before(HIST_WEIGHT_H, k_bin, BINS, CHUNK)
        most = _sum_before(HIST_WEIGHT_H, k_bin + 1, BINS, CHUNK)
        first, before = _find(HIST_WEIGHT_H, tl.maximum(share_of(top_p, least, True), 1), BINS, CHUNK)
        last, _ = _find(HIST_WEIGHT_H, share_of(top_p, most, True), BINS, CHUNK)
        tl.store(STATES + K_MASS, least)
        tl.store(STATES + P_MASS, before)
        tl.store(STATES + P_FIRST, first)
        tl.store(STATES + P_LAST, last)
    else:
        tl.store(STATES + P_FIRST, BINS)
        tl.store(STATES + P_LAST, -1)


@triton.jit
def gather_kernel(
    LOGITS, COUNTS, FIELDS, LIST_LOGIT, LIST_ID, STATE, LEVEL, TICKETS, stride, counts_stride, width,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    LINE, STATES, LEVELS = FIELDS + row * LINE_WIDTH, STATE + row * STATE_WIDTH, LEVEL + row * LEVEL_WIDTH
    if tl.load(LINE + VOCAB) == 0:
        return
    top_k, top_p = tl.load(LINE + TOP_K), tl.load(LINE + TOP_P)
    if (tl.load(STATES + PENDING) == 0) | ((top_k == 0) & (top_p == 0)):
        return
    source = source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width)
    spread = spread_of(LINE, LEVELS)
    k_bin, first, last = tl.load(STATES + K_BIN), tl.load(STATES + P_FIRST), tl.load(STATES + P_LAST)
    LENGTH = TICKETS + row * TICKET_WIDTH + LIST_LENGTH
    LOGIT_L, ID_L = LIST_LOGIT + row * LISTED, LIST_ID + row * LISTED
    ids = part * BLOCK + tl.arange(0, BLOCK)
    logits = load_logits(source, ids, HAS_COUNTS)
    weights, bins = weigh(logits, spread, BINS)
    near = (weights > 0) & ((bins == k_bin) | ((bins >= first) & (bins <= last)))
    found = tl.sum(near.to(tl.int32), 0)
    if found > 0:
        place = tl.atomic_add(LENGTH, found, sem="relaxed") + tl.cumsum(near.to(tl.int32), 0) - 1
        tl.store(LOGIT_L + place, logits, mask=near & (place < LISTED))
        tl.store(ID_L + place, ids, mask=near & (place < LISTED))


@triton.jit
def _members(
    source, spread, LOGIT_L, ID_L, listed, start, by, first, last, equal,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """(keys, measures, weights) of the list's elements from `start` on, or of the row's where the list overflowed. What
    lies outside of bins first to last, and by id what has not the key `equal`, measures and weighs 0."""
    index = start + tl.arange(0, BLOCK)
    if listed > LISTED:
        logits = load_logits(source, index, HAS_COUNTS)
        ids = index
    else:
        logits = tl.load(LOGIT_L + index, mask=index < listed, other=float("-inf"))
        ids = tl.load(ID_L + index, mask=index < listed, other=0)
    weights, bins = weigh(logits, spread, BINS)
    keys = key_of(logits)
    weights = tl.where((bins >= first) & (bins <= last) & ((by != _BY_ID) | (keys == equal)), weights, 0)
    measures = tl.where(by == _BY_WEIGHT, weights, (weights > 0).to(tl.int64))
    return tl.where(by == _BY_ID, -ids.to(tl.int64), keys), measures, weights


@triton.jit
def _select(
    source, spread, LOGIT_L, ID_L, listed, by, target, first, last, equal,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The largest key such that the measures of all from it on reach the target; the measures of those above it, their
    weights; how many have it."""
    stop = tl.where(listed > LISTED, source[7], listed)
    low, high = target * 0 - LOWEST_KEY, target * 0 + LOWEST_KEY
    for start in range(0, stop, BLOCK):
        keys, measures, _ = _members(
            source, spread, LOGIT_L, ID_L, listed, start, by, first, last, equal, HAS_COUNTS, BLOCK, BINS, LISTED
        )
        low = tl.minimum(low, tl.min(tl.where(measures > 0, keys, -LOWEST_KEY), 0))
        high = tl.maximum(high, tl.max(tl.where(measures > 0, keys, LOWEST_KEY), 0))
    high += 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached_B = tl.zeros([BLOCK], tl.int64)
        for start in range(0, stop, BLOCK):
            keys, measures, _ = _members(
                source, spread, LOGIT_L, ID_L, listed, start, by, first, last, equal, HAS_COUNTS, BLOCK, BINS, LISTED
            )
            reached_B += tl.where(keys >= middle, measures, 0)
        enough = tl.sum(reached_B, 0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above, mass, ties = target * 0, target * 0, target * 0
    for start in range(0, stop, BLOCK):
        keys, measures, weights = _members(
            source, spread, LOGIT_L, ID_L, listed, start, by, first, last, equal, HAS_COUNTS, BLOCK, BINS, LISTED
        )
        above += tl.sum(tl.where(keys > low, measures, 0), 0)
        mass += tl.sum(tl.where(keys > low, weights, 0), 0)
        ties += tl.sum(((keys == low) & (weights > 0)).to(tl.int64), 0)
    return low, above, mass, ties


@triton.jit
def cut_kernel(
    LOGITS, COUNTS, FIELDS, LIST_LOGIT, LIST_ID, STATE, LEVEL, TICKETS, stride, counts_stride, width,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The last logit that is kept, and the last id of those that have it: by count, then by weight, then by id."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    LINE, STATES, LEVELS = FIELDS + row * LINE_WIDTH, STATE + row * STATE_WIDTH, LEVEL + row * LEVEL_WIDTH
    if tl.load(LINE + VOCAB) == 0:
        return
    top_k, top_p = tl.load(LINE + TOP_K), tl.load(LINE + TOP_P)
    if (tl.load(STATES + PENDING) == 0) | ((top_k == 0) & (top_p == 0)):
        return
    source = source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width)
    spread = spread_of(LINE, LEVELS)
    LOGIT_L, ID_L = LIST_LOGIT + row * LISTED, LIST_ID + row * LISTED
    LENGTH = TICKETS + row * TICKET_WIDTH + LIST_LENGTH
    listed = tl.load(LENGTH)
    tl.debug_barrier()
    tl.store(LENGTH, 0)
    k_bin, p_first, p_last = tl.load(STATES + K_BIN), tl.load(STATES + P_FIRST), tl.load(STATES + P_LAST)
    mass = tl.load(STATES + K_MASS)
    key, take, ties, cut_id = k_bin * 0 + LOWEST_KEY, k_bin * 0 + LAST_ID, k_bin * 0, k_bin * 0 + LAST_ID
    for by in range(3):
        wanted = tl.where(
            by == _BY_COUNT, (top_k > 0) & (k_bin < BINS), tl.where(by == _BY_WEIGHT, top_p > 0, take < ties)
        )
        target = tl.where(by == _BY_COUNT, top_k - tl.load(STATES + K_ABOVE), take)
        target = tl.where(by == _BY_WEIGHT, share_of(top_p, mass, True) - tl.load(STATES + P_MASS), target)
        first = tl.where(by == _BY_COUNT, k_bin, tl.where(by == _BY_WEIGHT, p_first, 0))
        last = tl.where(by == _BY_COUNT, k_bin, tl.where(by == _BY_WEIGHT, p_last, BINS))
        if wanted:
            found, above, above_mass, found_ties = _select(
                source, spread, LOGIT_L, ID_L, listed, by, target, first, last, key, HAS_COUNTS, BLOCK, BINS, LISTED
            )
            if by == _BY_ID:
                cut_id = -found
            else:
                weight, _ = weigh(logit_of(found), spread, BINS)
                each = tl.where(by == _BY_WEIGHT, weight, 1)
                taken = (target - above + each - 1) // each
                take = tl.where(found == key, tl.minimum(take, taken), taken)
                key, ties = found, found_ties
                mass += above_mass + taken * weight
    tl.store(LEVELS + CUT_LOGIT, tl.where(key == LOWEST_KEY, float("-inf"), logit_of(key)))
    tl.store(STATES + CUT_ID, cut_id)
