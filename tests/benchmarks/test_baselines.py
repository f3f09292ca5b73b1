"""Baselines of the fidelity benchmark: what they store, and that the bytes are all there is."""

from __future__ import annotations

import pytest
import torch
from baselines import Baseline, Dare, DeltaCome, LowRank, Magnitude, Matrix, Whole, nbytes
from baselines_grid import bits_per_value, gptq, gptq_columns, round_to_nearest

ROWS, COLUMNS = 192, 320


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    """A difference of falling singular values, and inputs that are correlated."""
    generator = torch.Generator().manual_seed(0)
    base, noise = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    inputs = torch.randn(1000, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    difference = 1e-3 * (u * torch.arange(1.0, ROWS + 1) ** -0.7) @ v
    return Matrix("m", base, base + difference, inputs.T @ inputs / 1000)


def cost(matrix: Matrix, got: torch.Tensor) -> float:
    """Squared error of the outputs."""
    error = got - matrix.difference
    return torch.trace(error @ matrix.moment @ error.T).item()


@pytest.mark.parametrize("bits", [2.0, 1.0, 0.25])
@pytest.mark.parametrize("kind", ["low-rank", "rtn", "gptq", "dare", "magnitude"])
def test_the_budget_is_used_and_kept(matrix: Matrix, kind: str, bits: float) -> None:
    made: dict[str, Baseline] = {
        "low-rank": LowRank(bits),
        "rtn": DeltaCome(bits, calibrated=False),
        "gptq": DeltaCome(bits, calibrated=True),
        "dare": Dare(bits),
        "magnitude": Magnitude(bits),
    }
    parts = made[kind].encode(matrix, 0)
    budget = bits * ROWS * COLUMNS / 8
    slack = 0.05 * budget + 8 if kind == "dare" else 0  # how many it keeps is random, and the seed is stored
    assert 0.5 * budget < nbytes(parts) <= budget + slack
    again = made[kind].difference(parts, Matrix("m", matrix.base, matrix.base))
    assert torch.equal(again, made[kind].difference(parts, matrix)), "decoding looked at the fine-tune"


def test_low_rank_is_the_best_of_its_rank(matrix: Matrix) -> None:
    got = LowRank(4.0).difference(LowRank(4.0).encode(matrix, 0), matrix)
    rank = int(4 * ROWS * COLUMNS / (16 * (ROWS + COLUMNS)))
    tail = torch.linalg.svdvals(matrix.difference)[rank:].norm()
    assert (got - matrix.difference).norm().item() == pytest.approx(tail.item(), rel=1e-3)


@pytest.mark.parametrize("bits", [1.0, 0.02])
def test_magnitude_keeps_the_largest_as_they_are(matrix: Matrix, bits: float) -> None:
    """At 0.02 bits most distances between kept ones are more than a byte holds."""
    got = Magnitude(bits).difference(Magnitude(bits).encode(matrix, 0), matrix)
    kept = got != 0
    least = matrix.difference[kept].abs().min()
    assert torch.equal(got[kept], matrix.difference[kept].half().float())
    assert (matrix.difference[~kept].abs() <= least).all()
    assert 0 < kept.sum() < bits * ROWS * COLUMNS / 16


def test_dare_drops_at_random_and_rescales(matrix: Matrix) -> None:
    dare = Dare(4.0)
    one, two = (dare.difference(dare.encode(matrix, seed), matrix) for seed in (0, 1))
    assert torch.equal(one, dare.difference(dare.encode(matrix, 0), matrix))
    kept = one != 0
    assert torch.allclose(one[kept], 4 * matrix.difference[kept], rtol=1e-3, atol=1e-7)
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (kept & (two != 0)).float().mean().item() == pytest.approx(0.0625, abs=0.02)
    other = dare.difference(dare.encode(Matrix("other", matrix.base, matrix.fine), 0), matrix)
    assert not torch.equal(other != 0, kept), "all matrices share one mask"


@pytest.mark.parametrize(("bits", "more"), [(2, 3), (3, 4), (4, 8), (8, 8)])
def test_finer_grids_are_closer_and_take_their_bytes(matrix: Matrix, bits: int, more: int) -> None:
    values = matrix.base[:, :300]  # the last group is not full
    own, finer = (round_to_nearest(values, torch.full((ROWS,), b)) for b in (bits, more))
    assert own.nbytes == ROWS * 300 * bits // 8 + ROWS * 3 * 4
    assert own.nbytes == pytest.approx(bits_per_value(bits, 300) * ROWS * 300 / 8)
    assert (own.values() - values).square().mean() < 3.0 * 4.0**-bits
    assert (finer.values() - values).square().mean() <= (own.values() - values).square().mean()


def test_gptq_without_correlations_is_rounding(matrix: Matrix) -> None:
    bits = torch.full((ROWS,), 3)
    got, wanted = gptq(matrix.base, torch.eye(COLUMNS), bits), round_to_nearest(matrix.base[:, :256], bits)
    assert torch.equal(got.q_rL[:, :256], wanted.q_rL)
    assert torch.equal(got.low_rG[:, :2], wanted.low_rG)


def test_gptq_costs_less_than_rounding(matrix: Matrix) -> None:
    own = Matrix("weights", torch.zeros_like(matrix.base), matrix.base, matrix.moment)
    bits = torch.full((ROWS,), 3)
    rounded = cost(own, round_to_nearest(matrix.base, bits).values())
    assert cost(own, gptq(matrix.base, matrix.moment, bits).values()) < 0.8 * rounded
    columns = torch.full((COLUMNS,), 3)
    by_column = round_to_nearest(matrix.base.T.contiguous(), columns).values().T
    assert cost(own, gptq_columns(matrix.base, matrix.moment, columns).values().T) < 0.8 * cost(own, by_column)


def test_delta_come_spends_more_bits_on_larger_singular_values(matrix: Matrix) -> None:
    parts = DeltaCome(1.0, calibrated=False).encode(matrix, 0)
    bits = parts["a"].bits_r.tolist()
    assert bits == sorted(bits, reverse=True)
    assert bits[:3] == [8, 3, 3]
    assert set(bits[3:]) == {2}
    calibrated = DeltaCome(1.0, calibrated=True)
    plain = cost(matrix, DeltaCome(1.0, calibrated=False).difference(parts, matrix))
    assert cost(matrix, calibrated.difference(calibrated.encode(matrix, 0), matrix)) < plain


def test_a_smaller_budget_after_a_larger_one_is_as_if_alone(matrix: Matrix) -> None:
    alone = Matrix("m", matrix.base, matrix.fine, matrix.moment)
    small = DeltaCome(0.5, calibrated=True)
    DeltaCome(2.0, calibrated=True).encode(matrix, 0)
    first, second = (small.encode(m, 0) for m in (matrix, alone))
    assert torch.equal(first["a"].q_rL, second["a"].q_rL)
    assert torch.allclose(small.difference(first, matrix), small.difference(second, alone))


def test_whole_models_do_not_look_at_the_base(matrix: Matrix) -> None:
    for group, most in ((None, 0.02), (128, 0.015)):
        whole = Whole(8, group)
        parts = whole.encode(matrix, 0)
        other = Matrix("m", torch.zeros_like(matrix.base), matrix.fine)
        assert torch.equal(whole.encode(other, 0)["code"].values(), parts["code"].values())
        assert (matrix.base + whole.difference(parts, matrix) - matrix.fine).abs().max() < most
