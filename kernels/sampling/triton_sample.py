"""Sampling in up to six launches over (slices of a row, rows); a stage's last program of a row ends it for the row.

best     the largest logit; greedy rows are done
weigh    weights and their sum; rows that are not truncated are done; the others fill a histogram of 64 bins per octave
gather   the tokens in the bins in which the thresholds lie (`triton_truncate`)
cut      the exact threshold among them; one program per row
mass     what the kept tokens weigh; the token
rank     how many tokens were likelier, for rows that want it

"Last" is who takes the last ticket: all that a program has written is visible to who takes a later ticket (a barrier,
then an atomic with acquire and release). Counts and weights are integers, so the order of atomics changes nothing.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sampling.triton_common import (
    BEST_LOGIT,
    CHOSEN_LOGIT,
    CUT_ID,
    CUT_LOGIT,
    LAST_ID,
    LEVEL_WIDTH,
    LINE_WIDTH,
    LOGPROB,
    LOGSUM,
    PENDING,
    SCALE,
    STATE_WIDTH,
    TICKET_WIDTH,
    TOP_K,
    TOP_P,
    UNIFORM,
    VOCAB,
    count_token,
    floats_of,
    is_last,
    load_logits,
    share_of,
    source_of,
    spread_of,
    weigh,
)
from kernels.sampling.triton_truncate import bracket


@triton.jit(do_not_specialize=["rows"])
def best_kernel(
    LOGITS, COUNTS, FIELDS, OUT, BEST, WHERE, SUM, HIST_COUNT, HIST_WEIGHT, STATE, LEVEL, TICKETS,
    rows, stride, counts_stride, width, slice_stride,
    HAS_COUNTS: tl.constexpr, RANDOM: tl.constexpr, TRUNCATED: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    LINE = FIELDS + row * LINE_WIDTH
    if tl.load(LINE + VOCAB) == 0:
        return
    source = source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width)
    truncated = (tl.load(LINE + TOP_K) > 0) | (tl.load(LINE + TOP_P) > 0)
    ranked = tl.load(LINE + LOGPROB) != 0
    ids = part * BLOCK + tl.arange(0, BLOCK)
    logits = load_logits(source, ids, HAS_COUNTS)
    best = tl.max(tl.where(logits == logits, logits, float("-inf")), 0)
    where = tl.min(tl.where(logits != logits, -1, tl.where(logits == best, ids, LAST_ID)), 0)
    tl.store(BEST + row * slice_stride + part, best)
    tl.store(WHERE + row * slice_stride + part, where)
    if ranked:
        total = tl.sum(tl.where(logits > float("-inf"), tl.exp(logits - best), 0.0), 0)
        tl.store(SUM + row * slice_stride + part, total)
    if TRUNCATED and truncated:
        for first in range(part * BLOCK, BINS, tl.num_programs(0) * BLOCK):
            bins = first + tl.arange(0, BLOCK)
            tl.store(HIST_COUNT + row * BINS + bins, 0, mask=bins < BINS)
            tl.store(HIST_WEIGHT + row * BINS + bins, 0, mask=bins < BINS)
    if is_last(TICKETS + row * TICKET_WIDTH, 0):
        served = True
        if not RANDOM:
            served = False
        if not TRUNCATED:
            served = served & (truncated == 0)
        if not RANKS:
            served = served & (ranked == 0)
        _end_best(
            source, LINE, STATE + row * STATE_WIDTH, LEVEL + row * LEVEL_WIDTH, OUT + row, BEST + row * slice_stride,
            WHERE + row * slice_stride, SUM + row * slice_stride, rows, served, ranked, HAS_COUNTS, PADDED,
        )  # fmt: skip


@triton.jit
def _end_best(
    source, LINE, STATES, LEVELS, OUT, BEST_B, WHERE_B, SUM_B, rows, served, ranked,
    HAS_COUNTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    parts = tl.arange(0, PADDED)
    inside = parts < tl.num_programs(0)
    best_P = tl.load(BEST_B + parts, mask=inside, other=float("-inf"))
    where_P = tl.load(WHERE_B + parts, mask=inside, other=0)
    best = tl.max(best_P, 0)
    finite = (tl.min(where_P, 0) >= 0) & (best < float("inf")) & (best > float("-inf"))
    greedy = tl.load(floats_of(LINE) + SCALE) == 0
    done = finite & greedy
    token = tl.where(done, tl.min(tl.where(best_P == best, where_P, LAST_ID), 0), 0)
    tl.store(OUT, token)
    tl.store(OUT + rows, done.to(tl.int32))
    tl.store(STATES + PENDING, (finite & (greedy == 0) & served).to(tl.int32))
    tl.store(LEVELS + BEST_LOGIT, best)
    if done:
        count_token(source, token, HAS_COUNTS)
    if ranked & finite:
        sum_P = tl.load(SUM_B + parts, mask=inside, other=0.0)
        logsum = tl.log(tl.sum(tl.where(sum_P > 0, sum_P * tl.exp(best_P - best), 0.0), 0))
        tl.store(LEVELS + LOGSUM, best + logsum)
        if greedy:
            tl.store(OUT + 2 * rows, 1)
            tl.store(floats_of(OUT + 3 * rows), -logsum)


@triton.jit(do_not_specialize=["rows"])
def weigh_kernel(
    LOGITS, COUNTS, FIELDS, OUT, MASS, HIST_COUNT, HIST_WEIGHT, STATE, LEVEL, TICKETS,
    rows, stride, counts_stride, width, slice_stride,
    HAS_COUNTS: tl.constexpr, TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    LINE, STATES, LEVELS = FIELDS + row * LINE_WIDTH, STATE + row * STATE_WIDTH, LEVEL + row * LEVEL_WIDTH
    if tl.load(LINE + VOCAB) == 0:
        return
    if tl.load(STATES + PENDING) == 0:
        return
    source = source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width)
    spread = spread_of(LINE, LEVELS)
    top_k, top_p = tl.load(LINE + TOP_K), tl.load(LINE + TOP_P)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    weights, bins = weigh(load_logits(source, ids, HAS_COUNTS), spread, BINS)
    if TRUNCATED and top_k > 0:
        tl.atomic_add(HIST_COUNT + row * BINS + bins, 1, mask=weights > 0, sem="relaxed")
    if TRUNCATED and top_p > 0:
        tl.atomic_add(HIST_WEIGHT + row * BINS + bins, weights, mask=weights > 0, sem="relaxed")
    tl.store(MASS + row * slice_stride + part, tl.sum(weights, 0))
    if is_last(TICKETS + row * TICKET_WIDTH, 1):
        if (top_k > 0) | (top_p > 0):
            if TRUNCATED:
                bracket(STATES, HIST_COUNT + row * BINS, HIST_WEIGHT + row * BINS, top_k, top_p, BINS, CHUNK)
        else:
            _draw(
                source, spread, LINE, STATES, LEVELS, OUT + row, MASS + row * slice_stride, rows,
                HAS_COUNTS, False, BLOCK, PADDED, BINS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def mass_kernel(
    LOGITS, COUNTS, FIELDS, OUT, MASS, STATE, LEVEL, TICKETS, rows, stride, counts_stride, width, slice_stride,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    LINE, STATES, LEVELS = FIELDS + row * LINE_WIDTH, STATE + row * STATE_WIDTH, LEVEL + row * LEVEL_WIDTH
    if tl.load(LINE + VOCAB) == 0:
        return
    if (tl.load(STATES + PENDING) == 0) | ((tl.load(LINE + TOP_K) == 0) & (tl.load(LINE + TOP_P) == 0)):
        return
    source = source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width)
    spread = spread_of(LINE, LEVELS)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    weights = _kept(source, spread, STATES, LEVELS, ids, HAS_COUNTS, True, BINS)
    tl.store(MASS + row * slice_stride + part, tl.sum(weights, 0))
    if is_last(TICKETS + row * TICKET_WIDTH, 2):
        _draw(
            source, spread, LINE, STATES, LEVELS, OUT + row, MASS + row * slice_stride, rows,
            HAS_COUNTS, True, BLOCK, PADDED, BINS,
        )  # fmt: skip


@triton.jit
def _kept(source, spread, STATES, LEVELS, ids, HAS_COUNTS: tl.constexpr, CUT: tl.constexpr, BINS: tl.constexpr):
    """Weights at `ids`, 0 where they are not kept. CUT: by top-k and top-p too."""
    logits = load_logits(source, ids, HAS_COUNTS)
    weights, _ = weigh(logits, spread, BINS)
    if CUT:
        cut, cut_id = tl.load(LEVELS + CUT_LOGIT), tl.load(STATES + CUT_ID)
        weights = tl.where((logits > cut) | ((logits == cut) & (ids <= cut_id)), weights, 0)
    return weights


@triton.jit
def _draw(
    source, spread, LINE, STATES, LEVELS, OUT, MASS_B, rows, HAS_COUNTS: tl.constexpr, CUT: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The token at the row's random number, from the weights of its slices."""
    parts = tl.arange(0, PADDED)
    mass_P = tl.load(MASS_B + parts, mask=parts < tl.num_programs(0), other=0)
    sums_P = tl.cumsum(mass_P, 0)
    target = share_of(tl.load(LINE + UNIFORM), tl.sum(mass_P, 0), False)
    before_P = sums_P <= target
    target -= tl.max(tl.where(before_P, sums_P, 0), 0)
    first = tl.sum(before_P.to(tl.int32), 0) * BLOCK
    weights = _kept(source, spread, STATES, LEVELS, first + tl.arange(0, BLOCK), HAS_COUNTS, CUT, BINS)
    token = first + tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    tl.store(OUT, token)
    tl.store(OUT + rows, 1)
    if tl.load(LINE + LOGPROB) != 0:
        chosen = load_logits(source, token, HAS_COUNTS)
        tl.store(LEVELS + CHOSEN_LOGIT, chosen)
        tl.store(OUT + 2 * rows, 1)
        tl.store(floats_of(OUT + 3 * rows), chosen - tl.load(LEVELS + LOGSUM))
    count_token(source, token, HAS_COUNTS)


@triton.jit(do_not_specialize=["rows"])
def rank_kernel(
    LOGITS, COUNTS, FIELDS, OUT, STATE, LEVEL, rows, stride, counts_stride, width,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    LINE, STATES, LEVELS = FIELDS + row * LINE_WIDTH, STATE + row * STATE_WIDTH, LEVEL + row * LEVEL_WIDTH
    if tl.load(LINE + VOCAB) == 0:
        return
    if (tl.load(STATES + PENDING) == 0) | (tl.load(LINE + LOGPROB) == 0):
        return
    source = source_of(LOGITS, COUNTS, LINE, row, stride, counts_stride, width)
    chosen, token = tl.load(LEVELS + CHOSEN_LOGIT), tl.load(OUT + row)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    # The token itself has been counted since: its logit is another now.
    logits = load_logits(source, ids, HAS_COUNTS)
    likelier = tl.sum(((logits > chosen) & (ids != token)).to(tl.int32), 0)
    if likelier > 0:
        tl.atomic_add(OUT + 2 * rows + row, likelier, sem="relaxed")
