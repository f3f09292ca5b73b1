"""Shares of some work are all of it, in order, and about equal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitdelta_core.models.share import WHOLE, Share

COSTS = st.lists(st.one_of(st.just(0), st.integers(0, 1000)), max_size=40)


@given(COSTS, st.integers(1, 9))
def test_shares_are_the_whole(costs: list[int], count: int) -> None:
    shares = [list(range(len(costs)))[Share(i, count).of(costs)] for i in range(count)]
    assert [one for share in shares for one in share] == list(range(len(costs)))


@given(COSTS, st.integers(1, 9))
def test_none_is_more_than_its_part_and_one_piece(costs: list[int], count: int) -> None:
    for i in range(count):
        assert sum(costs[Share(i, count).of(costs)]) <= sum(costs) / count + max(costs, default=0)


def test_the_whole() -> None:
    assert [5, 0, 7][WHOLE.of([5, 0, 7])] == [5, 0, 7]
    assert [0, 0][WHOLE.of([0, 0])] == [0, 0]
