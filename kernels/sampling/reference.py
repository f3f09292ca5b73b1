"""The specification. A device kernel gives the same tokens, bit for bit; only log-probabilities may differ by rounding.

1. Penalties, in float32: l > 0 ? l * (1 / repetition) : l * repetition for tokens seen in prompt or output, then
   - frequency * count - presence * (count > 0).
2. The best token: the largest l, the lowest id among equals. Greedy rows take it. The row is finite when l has no NaN
   and its largest l is finite.
3. Weights: y = (best - l) * log2(e) / temperature in float32 and w = floor(2^40 * 2^-y), an integer; 2^-y by
   `weight`. Integers add up to the same sum in every order, so the result depends neither on blocks nor on threads.
4. Order: l descending, ids ascending among equals. Kept is the prefix with y <= -log2(min_p), of it the first top_k,
   of them the shortest prefix that has at least top_p of their sum M. w = 0 is never kept.
5. The token is read off the cumulative sums of the kept weights in order of ids: the first whose sum exceeds
   floor(uniform * M). No sort is needed to find it.

How exact: w is off by 2e-7 of itself and less than 2^-40 of the best token's weight; all that is cut off so is together
less than V * 2^-40 of the best (1e-7 for 128 k tokens). V < 2^23 keeps sums in 63 bits. The random number has 31 bits.

Shapes: S rows, R those of them that are sampled, V vocabulary, Q running sequences with penalties.
"""

from __future__ import annotations

import torch

from kernels.sampling.rows import FRACTION, PER_TOKEN, UNCOUNTED, RowField, Sampled, SamplingRows

ONE = 40
"""The best token weighs 2^ONE."""
HALVING = (
    -0.6931470632553101,
    0.24022436141967773,
    -0.05549075827002525,
    0.009579179808497429,
    -0.0012747483560815454,
    0.00010902324720518664,
)
"""2^-f = 1 + f (HALVING[0] + f (HALVING[1] + ...)) for f in [0, 1): in float32 off by 2e-7 of itself."""


def sample(logits_SV: torch.Tensor, rows: SamplingRows, counts_QV: torch.Tensor | None, out: Sampled) -> None:
    """As `kernels.sampling.sample`."""
    active_R = rows.fields_SF[:, RowField.VOCAB].nonzero().squeeze(1)
    if not active_R.numel():
        return
    fields_RF = rows.fields_SF[active_R]
    logits_RV = _own(logits_SV[active_R].float(), fields_RF)
    counted_C = (fields_RF[:, RowField.COUNTS] != UNCOUNTED).nonzero().squeeze(1)
    if counted_C.numel():
        assert counts_QV is not None, "a row has penalties, but there are no counts"
        logits_RV[counted_C] = penalised(logits_RV[counted_C], fields_RF[counted_C], counts_QV)
    best_R, token_R = logits_RV.max(dim=1)
    finite_R = best_R.isfinite()
    random_D = (finite_R & (_floats(fields_RF, RowField.SCALE) > 0)).nonzero().squeeze(1)
    if random_D.numel():
        token_R[random_D] = _draw(logits_RV[random_D], fields_RF[random_D])
    token_R = torch.where(finite_R, token_R, 0)
    out.token_S[active_R] = token_R.int()
    out.finite_S[active_R] = finite_R.int()
    wanted_W = (finite_R & (fields_RF[:, RowField.LOGPROB] != 0)).nonzero().squeeze(1)
    if wanted_W.numel():
        _logprobs(logits_RV[wanted_W], token_R[wanted_W], active_R[wanted_W], out)
    drawn_C = counted_C[finite_R[counted_C]]
    if counts_QV is not None:
        counts_QV[fields_RF[drawn_C, RowField.COUNTS].long(), token_R[drawn_C]] += PER_TOKEN


def penalised(logits_RV: torch.Tensor, fields_RF: torch.Tensor, counts_QV: torch.Tensor) -> torch.Tensor:
    """The logits [R, V] after the penalties of rows that all have counts."""
    counts_RV = counts_QV[fields_RF[:, RowField.COUNTS].long(), : logits_RV.shape[1]]
    repetition_R1 = _floats(fields_RF, RowField.REPETITION)[:, None]
    inverse_R1 = _floats(fields_RF, RowField.INVERSE)[:, None]
    repeated_RV = logits_RV * torch.where(logits_RV > 0, inverse_R1, repetition_R1)
    shaped_RV = torch.where(counts_RV > 0, repeated_RV, logits_RV)
    generated_RV = counts_RV // PER_TOKEN
    shaped_RV = shaped_RV - _floats(fields_RF, RowField.FREQUENCY)[:, None] * generated_RV
    return shaped_RV - _floats(fields_RF, RowField.PRESENCE)[:, None] * (generated_RV > 0)


def weight(octaves: torch.Tensor) -> torch.Tensor:
    """floor(2^(ONE - y)), int64, for float32 y >= 0: additions and multiplications that every machine rounds alike."""
    octaves = octaves.clamp(max=ONE + 1.0)
    whole = octaves.int()
    fraction = octaves - whole
    power = torch.full_like(octaves, HALVING[-1])
    for factor in reversed(HALVING[:-1]):
        power = power * fraction + factor
    power = power * fraction + 1.0
    return (power * _two_to(ONE - whole)).long()


def scaled(numerator: torch.Tensor, mass: torch.Tensor, *, up: bool) -> torch.Tensor:
    """numerator * mass / 2^FRACTION in int64, rounded down (or up), without leaving 64 bits."""
    high, low = mass >> FRACTION, mass & (2**FRACTION - 1)
    numerator = numerator.long()
    return numerator * high + ((numerator * low + (2**FRACTION - 1 if up else 0)) >> FRACTION)


def _two_to(exponent: torch.Tensor) -> torch.Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _floats(fields_RF: torch.Tensor, field: RowField) -> torch.Tensor:
    return fields_RF[:, field].view(torch.float32)


def _own(logits_RV: torch.Tensor, fields_RF: torch.Tensor) -> torch.Tensor:
    """-inf beyond each row's own vocabulary."""
    ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return logits_RV.masked_fill_(ids_V >= fields_RF[:, RowField.VOCAB, None], float("-inf"))


def _draw(logits_RV: torch.Tensor, fields_RF: torch.Tensor) -> torch.Tensor:
    """Token ids, int64 [R]."""
    best_R1 = logits_RV.max(dim=1, keepdim=True).values
    octaves_RV = (best_R1 - logits_RV) * _floats(fields_RF, RowField.SCALE)[:, None]
    within_RV = octaves_RV <= _floats(fields_RF, RowField.REACH)[:, None]
    weight_RV = torch.where(within_RV, weight(octaves_RV), 0)
    truncated_R = (fields_RF[:, RowField.TOP_K] > 0) | (fields_RF[:, RowField.TOP_P] > 0)
    for i in truncated_R.nonzero().squeeze(1).tolist():
        _truncate(logits_RV[i], weight_RV[i], fields_RF[i])
    mass_RV = weight_RV.cumsum(dim=1)
    target_R = scaled(fields_RF[:, RowField.UNIFORM], mass_RV[:, -1], up=False)
    return torch.searchsorted(mass_RV, target_R[:, None], right=True).squeeze(1)


def _truncate(logits_V: torch.Tensor, weight_V: torch.Tensor, fields_F: torch.Tensor) -> None:
    """Zero the weights that top-k and top-p leave out."""
    order_V = torch.sort(logits_V, descending=True, stable=True).indices
    sorted_V = weight_V[order_V]
    top_k, top_p = fields_F[RowField.TOP_K], fields_F[RowField.TOP_P]
    if top_k > 0:
        sorted_V[top_k:] = 0
    if top_p > 0:
        sums_V = sorted_V.cumsum(dim=0)
        sorted_V[sums_V - sorted_V >= scaled(top_p, sums_V[-1], up=True)] = 0
    weight_V[order_V] = sorted_V


def _logprobs(logits_WV: torch.Tensor, token_W: torch.Tensor, row_W: torch.Tensor, out: Sampled) -> None:
    chosen_W1 = logits_WV.gather(1, token_W[:, None])
    out.logprob_S[row_W] = (chosen_W1.squeeze(1) - logits_WV.logsumexp(dim=1)).float()
    out.rank_S[row_W] = ((logits_WV > chosen_W1).sum(dim=1) + 1).int()
