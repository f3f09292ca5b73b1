"""Where top-k and top-p end, exactly and without a sort.

Bins are ordered as logits are, so the histogram says in which bin a threshold lies: about 1 % of weight wide, it holds
few tokens, which are listed and bisected by their keys. Should there be more of them than the list takes (a thousand
equal logits do no harm, ten thousand do), the whole row is searched instead: slow, but as exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sampling.triton_common import (
    CUT_ID,
    CUT_LOGIT,
    K_ABOVE,
    K_BIN,
    K_MASS,
    LAST_ID,
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
    bits_of,
    is_last,
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
    LOGITS, COUNTS, FIELDS, LIST_LOGIT, LIST_ID, STATE, TICKETS, stride, counts_stride, width,
    HAS_COUNTS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    LINE, STATES = FIELDS + row * LINE_WIDTH, STATE + row * STATE_WIDTH
    if tl.load(LINE + VOCAB) == 0:
        return
    top_k, top_p = tl.load(LINE + TOP_K), tl.load(LINE + TOP_P)
    if (tl.load(STATES + PENDING) == 0) | ((top_k == 0) & (top_p == 0)):
        return
    source = source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width)
    spread = spread_of(LINE, STATES)
    k_bin, first, last = tl.load(STATES + K_BIN), tl.load(STATES + P_FIRST), tl.load(STATES + P_LAST)
    LENGTH = TICKETS + row * TICKET_WIDTH + LIST_LENGTH
    LOGIT_L, ID_L = LIST_LOGIT + row * LISTED, LIST_ID + row * LISTED
    lanes = part * SLICE + tl.arange(0, BLOCK)
    for start in tl.static_range(0, SLICE, BLOCK):
        logits = load_logits(source, lanes + start, HAS_COUNTS)
        weights, bins = weigh(logits, spread, BINS)
        near = (weights > 0) & ((bins == k_bin) | ((bins >= first) & (bins <= last)))
        found = tl.sum(near.to(tl.int32), 0)
        if found > 0:
            place = tl.atomic_add(LENGTH, found, sem="relaxed") + tl.cumsum(near.to(tl.int32), 0) - 1
            tl.store(LOGIT_L + place, logits, mask=near & (place < LISTED))
            tl.store(ID_L + place, lanes + start, mask=near & (place < LISTED))
    if is_last(TICKETS + row * TICKET_WIDTH, 2):
        listed = tl.load(LENGTH)
        tl.store(LENGTH, 0)
        _cut(source, spread, STATES, LOGIT_L, ID_L, listed, top_k, top_p, HAS_COUNTS, BLOCK, BINS, LISTED)


@triton.jit
def _members(
    source, spread, LOGIT_L, ID_L, listed, index, first, last, equal,
    BY: tl.constexpr, HAS_COUNTS: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """(keys, measures) of the list's elements at `index`, or of the row's where the list is too short. Measured is what
    lies in bins first to last, or by id what has the key `equal`; others measure 0."""
    if listed > LISTED:
        logits = load_logits(source, index, HAS_COUNTS)
        ids = index
    else:
        logits = tl.load(LOGIT_L + index, mask=index < listed, other=float("-inf"))
        ids = tl.load(ID_L + index, mask=index < listed, other=0)
    weights, bins = weigh(logits, spread, BINS)
    keys = key_of(logits)
    inside = (bins >= first) & (bins <= last) & (weights > 0)
    if BY == _BY_ID:
        inside &= keys == equal
        keys = -ids.to(tl.int64)
    if BY != _BY_WEIGHT:
        weights = tl.full(weights.shape, 1, tl.int64)
    return keys, tl.where(inside, weights, 0)


@triton.jit
def _at_least(
    source, spread, LOGIT_L, ID_L, listed, bound, first, last, equal,
    BY: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The measures of all whose key is at least `bound`."""
    total_B = tl.zeros([BLOCK], tl.int64)
    for start in range(0, tl.where(listed > LISTED, source[6], listed), BLOCK):
        index = start + tl.arange(0, BLOCK)
        keys, measures = _members(
            source, spread, LOGIT_L, ID_L, listed, index, first, last, equal, BY, HAS_COUNTS, BINS, LISTED
        )
        total_B += tl.where(keys >= bound, measures, 0)
    return tl.sum(total_B, 0)


@triton.jit
def _select(
    source, spread, LOGIT_L, ID_L, listed, target, first, last, equal,
    BY: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """(largest key such that the measures of all from it on reach the target, those above it, those from it on)"""
    low, high = target * 0 - LOWEST_KEY, target * 0 + LOWEST_KEY
    for start in range(0, tl.where(listed > LISTED, source[6], listed), BLOCK):
        index = start + tl.arange(0, BLOCK)
        keys, measures = _members(
            source, spread, LOGIT_L, ID_L, listed, index, first, last, equal, BY, HAS_COUNTS, BINS, LISTED
        )
        low = tl.minimum(low, tl.min(tl.where(measures > 0, keys, -LOWEST_KEY), 0))
        high = tl.maximum(high, tl.max(tl.where(measures > 0, keys, LOWEST_KEY), 0))
    high += 1
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = _at_least(
            source, spread, LOGIT_L, ID_L, listed, middle, first, last, equal, BY, HAS_COUNTS, BLOCK, BINS, LISTED
        )
        low = tl.where(reached >= target, middle, low)
        high = tl.where(reached >= target, high, middle)
    above = _at_least(
        source, spread, LOGIT_L, ID_L, listed, low + 1, first, last, equal, BY, HAS_COUNTS, BLOCK, BINS, LISTED
    )
    reached = _at_least(
        source, spread, LOGIT_L, ID_L, listed, low, first, last, equal, BY, HAS_COUNTS, BLOCK, BINS, LISTED
    )
    return low, above, reached


@triton.jit
def _cut(
    source, spread, STATES, LOGIT_L, ID_L, listed, top_k, top_p,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The last logit that is kept, and the last id of those that have it."""
    k_bin = tl.load(STATES + K_BIN)
    key = k_bin * 0 + LOWEST_KEY
    take = k_bin * 0 + LAST_ID
    ties = k_bin * 0
    mass = tl.load(STATES + K_MASS)
    if (top_k > 0) & (k_bin < BINS):
        target = top_k - tl.load(STATES + K_ABOVE)
        key, above, reached = _select(
            source, spread, LOGIT_L, ID_L, listed, target, k_bin, k_bin, key,
            _BY_COUNT, HAS_COUNTS, BLOCK, BINS, LISTED,
        )  # fmt: skip
        take, ties = target - above, reached - above
        if top_p > 0:
            one, _ = weigh(logit_of(key), spread, BINS)
            mass += take * one + _at_least(
                source, spread, LOGIT_L, ID_L, listed, key + 1, k_bin, k_bin, key,
                _BY_WEIGHT, HAS_COUNTS, BLOCK, BINS, LISTED,
            )  # fmt: skip
    if top_p > 0:
        target = share_of(top_p, mass, True) - tl.load(STATES + P_MASS)
        p_key, above, reached = _select(
            source, spread, LOGIT_L, ID_L, listed, target, tl.load(STATES + P_FIRST), tl.load(STATES + P_LAST), key,
            _BY_WEIGHT, HAS_COUNTS, BLOCK, BINS, LISTED,
        )  # fmt: skip
        one, _ = weigh(logit_of(p_key), spread, BINS)
        p_take = (target - above + one - 1) // one
        take = tl.where(p_key > key, p_take, tl.minimum(take, p_take))
        ties = (reached - above) // one
        key = p_key
    tl.store(STATES + CUT_LOGIT, bits_of(tl.where(key == LOWEST_KEY, float("-inf"), logit_of(key))))
    tl.store(STATES + CUT_ID, LAST_ID)
    if take < ties:
        last_id, _, _ = _select(
            source, spread, LOGIT_L, ID_L, listed, take, 0, BINS, key, _BY_ID, HAS_COUNTS, BLOCK, BINS, LISTED
        )
        tl.store(STATES + CUT_ID, -last_id)
