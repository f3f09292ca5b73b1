"""The routing policy: pure, so its laws are checked directly."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from deployments.router import Candidate, Policy

KEYS = st.text("0123456789abcdef", min_size=64, max_size=64)
QUEUES = st.integers(0, 60)
NAMES = st.text("abcdefgh", min_size=1, max_size=6)
CANDIDATES = st.dictionaries(NAMES, st.tuples(QUEUES, st.booleans()), min_size=1).map(
    lambda found: [Candidate(name, queue, resident) for name, (queue, resident) in found.items()]
)
POLICY = Policy()


def idle(*names: str) -> list[Candidate]:
    return [Candidate(name, 0) for name in names]


@given(st.none() | KEYS, CANDIDATES)
def test_every_candidate_is_ranked_once(key: str | None, candidates: list[Candidate]) -> None:
    assert sorted(POLICY.order(key, candidates)) == sorted(c.id for c in candidates)


@given(KEYS, CANDIDATES, st.randoms())
def test_the_order_does_not_depend_on_theirs(key: str, candidates: list[Candidate], random: Random) -> None:
    shuffled = random.sample(candidates, len(candidates))
    busy = [c for c in candidates if c.queue >= POLICY.spill_queue]
    if not busy:
        assert POLICY.order(key, candidates) == POLICY.order(key, shuffled)


@given(KEYS, CANDIDATES)
def test_removing_a_replica_moves_nobody_else(key: str, candidates: list[Candidate]) -> None:
    """What makes rendezvous hashing worth it: deltas of the other replicas stay where they are."""
    quiet = [Candidate(c.id, 0) for c in candidates]
    order = POLICY.order(key, quiet)
    for gone in order:
        assert POLICY.order(key, [c for c in quiet if c.id != gone]) == [name for name in order if name != gone]


@given(KEYS, CANDIDATES)
def test_a_replica_past_the_bound_is_passed_over_unless_all_are(key: str, candidates: list[Candidate]) -> None:
    by_id = {c.id: c for c in candidates}
    limit = max(POLICY.spill_queue, POLICY.load_factor * sum(c.queue for c in candidates) / len(candidates) + 1)
    past = [by_id[name].queue >= limit for name in POLICY.order(key, candidates)]
    assert past == sorted(past)


@given(CANDIDATES)
def test_the_base_goes_to_the_shortest_queue(candidates: list[Candidate]) -> None:
    queues = {c.id: c.queue for c in candidates}
    assert [queues[name] for name in POLICY.order(None, candidates)] == sorted(queues.values())


def test_the_base_is_spread_over_idle_replicas() -> None:
    first = Counter(POLICY.order(None, idle("a", "b", "c"))[0] for _ in range(300))
    assert min(first[name] for name in "abc") > 50


def test_deltas_are_spread_over_replicas() -> None:
    first = Counter(POLICY.order(f"{i:064x}", idle("a", "b", "c"))[0] for i in range(300))
    assert min(first[name] for name in "abc") > 60


def test_load_spills_first_to_a_holder() -> None:
    key = "0" * 64
    home, second, third = POLICY.order(key, idle("a", "b", "c"))
    busy = [Candidate(home, 100, True), Candidate(second, 0), Candidate(third, 0, True)]
    assert POLICY.order(key, busy) == [third, second, home]
    calm = [Candidate(home, 11), Candidate(second, 0), Candidate(third, 0, True)]
    assert POLICY.order(key, calm)[0] == home
