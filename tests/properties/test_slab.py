"""The slab against a model that paints every extent with its owner's colour."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bitdelta_core.engine.slab import ALIGNMENT, Slab, align
from bitdelta_core.errors import DeltaTooLarge

KEYS = [f"delta-{i}" for i in range(8)]
RESERVED = 99


class Slabs(RuleBasedStateMachine):
    @initialize(
        units=st.integers(1, 10),
        rest=st.integers(0, ALIGNMENT - 1),
        reserved=st.sampled_from([0, 0, 1, 300]),
        limit=st.sampled_from([None, None, 1, 2, 4]),
    )
    def start(self, units: int, rest: int, reserved: int, limit: int | None) -> None:
        self.slab = Slab(units * ALIGNMENT + rest, reserved=reserved, max_extents=limit)
        self.slab.buffer[:reserved] = RESERVED
        self.reserved = reserved
        self.limit = limit
        self.pins = dict.fromkeys(KEYS, 0)
        self.used: list[str] = []

    def unpinned(self) -> list[str]:
        return [key for key in self.used if not self.pins[key]]

    @rule(key=st.sampled_from(KEYS), nbytes=st.integers(0, 5 * ALIGNMENT))
    def load(self, key: str, nbytes: int) -> None:
        if key in self.slab:
            return
        if align(max(nbytes, 1)) > self.slab.nbytes:
            with pytest.raises(DeltaTooLarge) as caught:
                self.slab.plan(key, nbytes)
            assert caught.value.delta == key
            return
        before = self.slab.keys
        plan = self.slab.plan(key, nbytes)
        assert self.slab.keys == before, "plan() changed something"
        if plan is None:
            assert any(self.pins.values()), "refused although nothing is pinned"
            return
        assert self.limit is None or len(self.used) - len(plan.evict) < self.limit
        assert all(not self.pins[victim] for victim in plan.evict), "a pinned extent would be evicted"
        if plan.evict:
            last = max(self.unpinned().index(victim) for victim in plan.evict)
            spared = set(self.unpinned()[: last + 1]) - set(plan.evict)
            in_hole = {k for k in spared if self._inside(k, plan.extent.start, plan.extent.stop)}
            assert not in_hole
        view = self.slab.commit(plan)
        assert view.numel() >= nbytes
        view.fill_(KEYS.index(key))
        self.used = [k for k in self.used if k not in plan.evict] + [key]
        self.pins[key] = 1

    def _inside(self, key: str, start: int, stop: int) -> bool:
        at = self.slab.view(key).storage_offset()
        return start <= at < stop

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.used))
        self.slab.pin(key)
        self.pins[key] += 1
        self.used.remove(key)
        self.used.append(key)

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([k for k in self.used if self.pins[k]]))
        self.slab.unpin(key)
        self.pins[key] -= 1

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "slab"):
            return
        self.slab.check_integrity()
        assert list(self.slab.keys) == self.used, "not least recently used first"
        assert list(self.slab.pinned) == [k for k in self.used if self.pins[k]]
        assert (self.slab.buffer[: self.reserved] == RESERVED).all(), "reserved bytes were overwritten"
        for key in self.used:
            assert (self.slab.view(key) == KEYS.index(key)).all(), "an extent was overwritten"


TestSlab = Slabs.TestCase
TestSlab.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_limit_of_extents_evicts_beside_the_hole() -> None:
    slab = Slab(4 * ALIGNMENT, max_extents=2)
    for key in ("a", "b"):
        plan = slab.plan(key, ALIGNMENT)
        assert plan is not None
        slab.commit(plan)
    assert slab.plan("c", ALIGNMENT) is None, "both are pinned"
    slab.unpin("b")
    plan = slab.plan("c", ALIGNMENT)
    assert plan is not None
    assert plan.evict == ("b",)
    assert plan.extent.start == 2 * ALIGNMENT


def test_evicts_least_recently_used_until_a_hole_fits() -> None:
    slab = Slab(4 * ALIGNMENT)
    for key in ("a", "b", "c", "d"):
        plan = slab.plan(key, ALIGNMENT)
        assert plan is not None
        slab.commit(plan)
        slab.unpin(key)
    slab.pin("b")  # a, c and d are free to go, but only c and d are neighbours
    plan = slab.plan("e", 2 * ALIGNMENT)
    assert plan is not None
    assert set(plan.evict) == {"c", "d"}
    slab.pin("c")
    assert slab.plan("e", 2 * ALIGNMENT) is None
    plan = slab.plan("e", ALIGNMENT)
    assert plan is not None
    assert plan.evict == ("a",)
