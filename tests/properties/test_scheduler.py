"""The scheduler under random arrivals, ends and memory pressure: sound after every step, and nobody starves."""

from __future__ import annotations

from collections import deque
from itertools import groupby

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bitdelta_core.engine.api import GenerationRequest, SamplingParams
from bitdelta_core.engine.blocks import BlockManager
from bitdelta_core.engine.scheduler import Scheduler, StepPlan, Work
from bitdelta_core.engine.sequence import Sequence
from kernels.segments import BASE

SIZE = 4
DELTAS = (None, "aa", "bb", "cc", "dd")


def sequence(
    arrival: int,
    prompt: list[int],
    generate: int,
    *,
    delta: str | None = None,
    tenant: str = "",
    leader: Sequence | None = None,
    prompt_logprobs: int | None = None,
) -> Sequence:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    request = GenerationRequest(
        request_id=str(arrival), prompt_token_ids=tuple(prompt), delta=delta, tenant=tenant, params=params
    )
    slot = BASE if delta is None else DELTAS.index(delta)
    return Sequence(
        request=request, arrival=arrival, tokens=list(prompt), max_len=len(prompt) + generate, slot=slot, leader=leader
    )


def check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    assert sum(w.rows for w in plan.work) <= scheduler.max_num_batched_tokens
    assert all(w.rows > 0 for w in plan.work)
    slots = [slot for slot, _ in groupby(w.seq.slot for w in plan.work)]
    assert len(slots) == len(set(slots)), "a variant's rows are not one run"
    assert len({w.seq.delta for w in plan.work} - {None}) <= scheduler.max_variants_per_step


def step(scheduler: Scheduler, launched: deque[StepPlan] | None = None) -> StepPlan:
    """Plan (twice, to see that it is pure), commit, and compute: every sampling sequence gets a token or ends.

    With `launched` the results of a step come after the next one has been committed.
    """
    plan = scheduler.plan()
    assert plan == scheduler.plan(), "plan() is not pure"
    check_plan(scheduler, plan)
    scheduler.commit(plan)
    queue = deque() if launched is None else launched
    queue.append(plan)
    while len(queue) > (launched is not None and bool(plan.work)):
        for w in queue.popleft().work:
            collect(scheduler, w)
    return plan


def collect(scheduler: Scheduler, w: Work) -> None:
    seq = w.seq
    if seq not in {*scheduler.running, *scheduler.waiting()}:
        return  # it was aborted
    scheduler.advance(w)
    if w.samples:
        seq.receive(seq.arrival % 3)
        if len(seq.tokens) >= seq.max_len:
            scheduler.remove(seq)


class Scheduling(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(6, 16),
        seqs=st.integers(1, 5),
        extra=st.integers(0, 12),
        variants=st.integers(1, 3),
        caching=st.booleans(),
        late=st.booleans(),
    )
    def start(self, blocks: int, seqs: int, extra: int, variants: int, caching: bool, late: bool) -> None:
        self.scheduler = Scheduler(
            BlockManager(blocks, SIZE, prefix_caching=caching),
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + extra,
            max_variants_per_step=variants,
        )
        self.open: list[Sequence] = []
        self.arrivals = 0
        self.launched: deque[StepPlan] | None = deque() if late else None

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=10),
        generate=st.integers(1, 9),
        delta=st.sampled_from(DELTAS),
        tenant=st.sampled_from("xyz"),
        n=st.integers(1, 3),
        echo=st.booleans(),
        synchronous=st.booleans(),
    )
    def arrive(
        self, prompt: list[int], generate: int, delta: str | None, tenant: str, n: int, echo: bool, synchronous: bool
    ) -> None:
        leader = None
        for _ in range(n):
            self.arrivals += 1
            seq = sequence(
                self.arrivals, prompt, generate, delta=delta, tenant=tenant, leader=leader,
                prompt_logprobs=0 if echo else None,
            )  # fmt: skip
            seq.synchronous = synchronous
            self.scheduler.add(seq)
            self.open.append(seq)
            leader = leader or seq

    @precondition(lambda self: self.open)
    @rule()
    def compute(self) -> None:
        under_way = bool(self.launched)
        assert step(self.scheduler, self.launched) or under_way, "sequences are open, but nothing is done"
        self.open = [seq for seq in self.open if len(seq.tokens) < seq.max_len]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.open))
        for seq in [s for s in self.open if s is victim or s.leader is victim]:
            self.scheduler.remove(seq)
            self.open.remove(seq)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert {*self.scheduler.running, *self.scheduler.waiting()} == set(self.open), "a sequence was lost"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(50 + 40 * len(self.open)):
            if not self.open:
                break
            self.compute()
        assert not self.open, "somebody starves"
        self.scheduler.check_integrity()
        assert self.scheduler.blocks.used == 0


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@settings(max_examples=30, deadline=None)
@given(light=st.integers(2, 4), heavy=st.integers(6, 20), cap=st.integers(1, 2))
def test_a_tenant_with_few_requests_is_served_beside_one_with_many(light: int, heavy: int, cap: int) -> None:
    """Both tenants always have requests waiting: what they get differs by at most what two sequences each cost."""
    scheduler = Scheduler(
        BlockManager(200, SIZE, prefix_caching=False),
        max_num_seqs=2, max_num_batched_tokens=8, max_variants_per_step=cap,
    )  # fmt: skip
    got = {"light": 0, "heavy": 0}
    for arrival in range(heavy):
        scheduler.add(sequence(arrival, [0] * 8, 8, tenant="heavy", delta="aa"))
    waiting = [sequence(100 + i, [0] * 8, 8, tenant="light", delta="bb") for i in range(heavy)]
    for seq in waiting[:light]:
        scheduler.add(seq)
    waiting = waiting[light:]
    while scheduler._tenants["heavy"] and scheduler._tenants["light"]:
        plan = step(scheduler)
        for w in plan.work:
            got[w.seq.tenant] += w.rows
        while waiting and scheduler._tenants["light"] < light:
            scheduler.add(waiting.pop(0))
        assert abs(got["light"] - got["heavy"]) <= 2 * 2 * (8 + 8 * 2)


def test_rows_of_an_unlimited_flood_do_not_starve_a_variant() -> None:
    """One variant per step: a late variant has its turn although the early one always has rows."""
    scheduler = Scheduler(BlockManager(100, SIZE), max_num_seqs=4, max_num_batched_tokens=16, max_variants_per_step=1)
    late = sequence(1000, [1] * 6, 3, delta="bb")
    for arrival in range(4):
        scheduler.add(sequence(arrival, [0, 1, 0], 40, delta="aa"))
    step(scheduler)
    scheduler.remove(scheduler.running[-1])
    scheduler.add(late)
    steps = 0
    while len(late.tokens) < late.max_len:
        scheduler.add(sequence(2000 + steps, [0, 1, 1], 40, delta="aa"))
        step(scheduler)
        steps += 1
    assert steps <= 12
