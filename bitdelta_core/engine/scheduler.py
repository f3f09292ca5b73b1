"""Which rows the next step computes.

Continuous batching with chunked prefill: every running sequence that decodes gets its row, the rest of the step's token
budget goes to prompts. Whose turn it is:

- Within a tenant: first come, first served.
- Across tenants: the one that has received least, in tokens weighted 1 (input) and 2 (output). A tenant that was away
  does not collect credit: its counter is lifted to the least of those present (virtual token counters,
  arXiv 2401.00588).
- Across variants: each distinct variant costs its delta's bytes in bandwidth, so one step serves at most
  `max_variants_per_step` of them, least recently served first. The base costs nothing extra and is always served.
- When blocks run out, the youngest running sequence gives all of its own back and is computed again later.

A step may be planned before the last one's results are known (overlap). Then a sequence has a token that the host has
not seen: it counts, its row is planned, and nothing else here looks at its value. A sequence that is about to reach its
length, or that is `synchronous`, is passed over until its token is known. Steps run in the order of their commits, so a
block that changes hands at a commit is never written by the old owner after the new one.

Nobody starves: a sequence's arrival number never changes, the oldest running sequence can take every other's blocks, no
request passes the chosen one that waits for blocks, and variants take turns.

`plan()` changes nothing and can be tested alone; `commit()` cannot fail. The same plan follows from the same state.
Not covered: priorities, deadlines, swapping blocks to the host instead of recomputing.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from bitdelta_core.engine.blocks import BlockManager, Claim, chain_key, root_key
from bitdelta_core.engine.sequence import Sequence

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2


@dataclass(frozen=True, slots=True)
class Work:
    """Compute `rows` tokens of `seq`, beginning at position `start`."""

    seq: Sequence
    start: int
    rows: int
    claim: Claim
    samples: bool
    """Whether the step ends with a new token for this sequence."""
    prompt_logprobs: bool
    """Whether the logits of all rows are wanted."""
    life: int
    """How often the sequence has been preempted: what the rows leave in its blocks counts in this life alone."""

    @property
    def stop(self) -> int:
        """The position after the last row: where a new token goes."""
        return self.start + self.rows


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`work` is sorted so that each variant's rows are one run."""

    work: tuple[Work, ...] = ()
    preempt: tuple[Sequence, ...] = ()
    admit: tuple[Sequence, ...] = ()
    """Joining `running`; one without work has its turn in a later step."""

    def __bool__(self) -> bool:
        return bool(self.work or self.preempt or self.admit)


class Scheduler:
    """Sequences that could run now: their deltas are pinned, their requests validated."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, max_variants_per_step: int
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every decoding sequence needs its row"
        assert max_variants_per_step >= 1
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_variants_per_step = max_variants_per_step
        self.running: list[Sequence] = []
        """By arrival."""
        self.step = 0
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._waiting: dict[str, list[Sequence]] = {}
        self._counters: dict[str, int] = {}
        self._served: dict[str | None, int] = {}
        self._tenants: Counter[str] = Counter()
        self._variants: Counter[str | None] = Counter()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting(self) -> Iterator[Sequence]:
        for queue in self._waiting.values():
            yield from queue

    def add(self, seq: Sequence) -> None:
        """The sequence may be scheduled from now on. It fits the cache when it is alone (the engine has checked)."""
        assert self.blocks.blocks_for(seq.max_len) <= self.blocks.total, "could never be computed"
        seq.ready_step = self.step
        if not self._tenants[seq.tenant]:
            present = [self._counters[t] for t in self._tenants if self._tenants[t]]
            self._counters[seq.tenant] = max(self._counters.get(seq.tenant, 0), min(present, default=0))
        self._tenants[seq.tenant] += 1
        self._variants[seq.delta] += 1
        self._enqueue(seq)

    def remove(self, seq: Sequence) -> None:
        """The sequence is over, whatever its state. Its blocks are free afterwards."""
        if seq.admitted:
            self.running.remove(seq)
            seq.admitted = False
        else:
            self._dequeue(seq)
        self.blocks.release(seq.forget_blocks())
        self._variants[seq.delta] -= 1
        self._tenants[seq.tenant] -= 1
        if not self._variants[seq.delta]:
            del self._variants[seq.delta]
            self._served.pop(seq.delta, None)
        if not self._tenants[seq.tenant]:
            del self._tenants[seq.tenant]
            self._forget_absent_tenants()

    def plan(self) -> StepPlan:
        """What the next step should be; falsy when nothing can be done."""
        return _Planner(self).build()

    def commit(self, plan: StepPlan) -> None:
        """Make the plan true: blocks change hands. Nothing changed since `plan()`."""
        self.step += 1
        for seq in plan.preempt:
            self.running.remove(seq)
            seq.admitted = False
            self._enqueue(seq)
            seq.preemptions += 1
        self.preemptions += len(plan.preempt)
        for seq in plan.admit:
            self._dequeue(seq)
            seq.admitted = True
            insort(self.running, seq, key=attrgetter("arrival"))
        released = [seq.forget_blocks() for seq in plan.preempt]
        granted = self.blocks.commit([work.claim for work in plan.work], released)
        for work, blocks in zip(plan.work, granted, strict=True):
            self._begin(work)
            work.seq.table.extend(blocks)
            work.seq.computed = work.stop
            work.seq.unseen += work.samples
            work.seq.prompt_done = work.seq.prompt_done or work.stop >= work.seq.prompt_len

    def advance(self, work: Work) -> None:
        """The rows of `work`, in the order of commits, have been computed: make full blocks findable.

        All tokens of the rows are known by now: the last of them may have been sampled by the step before.
        """
        seq, size = work.seq, self.blocks.block_size
        if work.life != seq.preemptions:
            return
        assert len(seq.tokens) >= work.stop, "a row of an unknown token"
        for i in range(len(seq.chain), work.stop // size):
            parent = seq.chain[-1] if seq.chain else root_key(seq.delta)
            seq.chain.append(self.blocks.publish(seq.table[i], parent, seq.tokens[i * size : (i + 1) * size]))

    def _begin(self, work: Work) -> None:
        seq, size = work.seq, self.blocks.block_size
        self._served[seq.delta] = self.step
        self._counters[seq.tenant] += price(work)
        first, seq.charged = not seq.charged, max(seq.charged, work.stop)
        if seq.table:
            return
        parent = root_key(seq.delta)
        for i in range(len(work.claim.hits)):
            parent = chain_key(parent, seq.tokens[i * size : (i + 1) * size])
            seq.chain.append(parent)
        if first:
            seq.cached_tokens = work.start
            self.prefix_queries += seq.prompt_len
            self.prefix_hits += seq.cached_tokens

    def _enqueue(self, seq: Sequence) -> None:
        insort(self._waiting.setdefault(seq.tenant, []), seq, key=attrgetter("arrival"))

    def _dequeue(self, seq: Sequence) -> None:
        queue = self._waiting[seq.tenant]
        queue.remove(seq)
        if not queue:
            del self._waiting[seq.tenant]

    def _forget_absent_tenants(self) -> None:
        """An absent tenant's counter matters only while it is above the least of those present."""
        floor = min((self._counters[t] for t in self._tenants), default=None)
        for tenant in [t for t in self._counters if t not in self._tenants]:
            if floor is None or self._counters[tenant] <= floor:
                del self._counters[tenant]

    def check_integrity(self) -> None:
        """Assert every invariant, the block manager's included."""
        waiting = list(self.waiting())
        self.blocks.check_integrity(seq.table for seq in self.running)
        assert len(self.running) <= self.max_num_seqs
        assert [s.arrival for s in self.running] == sorted({s.arrival for s in self.running}), "running is out of order"
        for queue in self._waiting.values():
            assert queue, "empty queue kept"
            assert [s.arrival for s in queue] == sorted({s.arrival for s in queue}), "a queue is out of order"
        assert all(s.admitted for s in self.running)
        assert not any(s.admitted or s.table or s.computed for s in waiting), "a waiting sequence holds blocks"
        for seq in self.running:
            assert seq.computed < seq.length <= seq.max_len, "nothing left to compute"
            assert len(seq.tokens) < seq.max_len, "over, but running"
            assert len(seq.table) * self.blocks.block_size >= seq.computed, "computed tokens without a block"
            assert len(seq.chain) <= seq.computed // self.blocks.block_size, "a block is findable that is not full"
        assert Counter(s.tenant for s in [*self.running, *waiting]) == self._tenants
        assert Counter(s.delta for s in [*self.running, *waiting]) == self._variants
        assert self._tenants.keys() <= self._counters.keys()


def price(work: Work) -> int:
    """What a tenant pays for the rows that it has not paid for before."""
    first, last, prompt = max(work.start, work.seq.charged), work.stop, work.seq.prompt_len
    inputs = max(0, min(last, prompt) - first)
    return INPUT_WEIGHT * inputs + OUTPUT_WEIGHT * (max(0, last - first) - inputs)


class _Planner:
    """The draft of one step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.draft = scheduler.blocks.draft()
        self.budget = scheduler.max_num_batched_tokens
        self.work: dict[Sequence, Work] = {}
        self.preempt: list[Sequence] = []
        self.admit: list[Sequence] = []
        self.variants = self._take_turns()

    def build(self) -> StepPlan:
        ready = [seq for seq in self.scheduler.running if seq.can_go_on and self._served_now(seq)]
        for seq in sorted(ready, key=lambda s: s.remaining > 1):  # stable: decoding first, each by arrival
            self._extend(seq)
        if not self.preempt and self.scheduler._waiting:
            self._admit()
        work = sorted(self.work.values(), key=lambda w: (w.seq.slot, w.seq.arrival))
        return StepPlan(tuple(work), tuple(self.preempt), tuple(self.admit))

    def _take_turns(self) -> set[str]:
        """The running variants that this step serves, least recently served first."""
        last: dict[str, int] = {}
        for seq in self.scheduler.running:
            if seq.delta is not None and seq.delta not in last and seq.can_go_on:
                last[seq.delta] = self.scheduler._served.get(seq.delta, seq.ready_step)
        return set(sorted(last, key=last.__getitem__)[: self.scheduler.max_variants_per_step])

    def _served_now(self, seq: Sequence) -> bool:
        return seq.delta is None or seq.delta in self.variants

    def _claim(self, seq: Sequence) -> tuple[Claim, int]:
        """The blocks for all tokens that the sequence has, and the position at which computing begins."""
        total = self.scheduler.blocks.blocks_for(seq.length)
        if seq.table:
            return Claim(fresh=total - len(seq.table)), seq.computed
        hits = self._known_blocks(seq)
        return Claim(hits, total - len(hits)), len(hits) * self.scheduler.blocks.block_size

    def _known_blocks(self, seq: Sequence) -> tuple[int, ...]:
        if seq.wants_prompt_logprobs:
            return ()
        hits, _ = self.scheduler.blocks.match(seq.delta, seq.tokens)
        leader = seq.leader
        if leader is not None and leader not in self.preempt and leader.computed >= seq.prompt_len:
            shared = (seq.prompt_len - 1) // self.scheduler.blocks.block_size
            hits = max(hits, tuple(leader.table[:shared]), key=len)
        return hits

    def _extend(self, seq: Sequence) -> None:
        if seq in self.preempt or not self.budget:
            return
        claim, start = self._claim(seq)
        while not self.draft.take(claim):
            victim = next(s for s in reversed(self.scheduler.running) if s not in self.preempt)
            self._evict(victim)
            if victim is seq:
                return
            claim, start = self._claim(seq)
        self._compute(seq, start, claim)

    def _evict(self, victim: Sequence) -> None:
        self.preempt.append(victim)
        work = self.work.pop(victim, None)
        if work is not None:
            self.budget += work.rows
            self.draft.untake(work.claim)
        self.draft.release(victim.table)

    def _compute(self, seq: Sequence, start: int, claim: Claim) -> None:
        rows = min(seq.length - start, self.budget)
        self.budget -= rows
        self.work[seq] = Work(
            seq, start, rows, claim, start + rows == seq.length, seq.wants_prompt_logprobs, seq.preemptions
        )

    def _admit(self) -> None:
        counters = dict(self.scheduler._counters)
        queues = {t: iter(q) for t, q in self.scheduler._waiting.items()}
        heads = {t: head for t, queue in queues.items() if (head := _next_eligible(queue)) is not None}
        room = self.scheduler.max_num_seqs - len(self.scheduler.running)
        while heads and room and self.budget:
            tenant = min(heads, key=lambda t: (counters[t], heads[t].arrival))
            seq = heads.pop(tenant)
            if self._may_join(seq):
                claim, start = self._claim(seq)
                if not self.draft.take(claim):
                    return
                self._compute(seq, start, claim)
                counters[tenant] += price(self.work[seq])
            self.admit.append(seq)
            room -= 1
            following = _next_eligible(queues[tenant])
            if following is not None:
                heads[tenant] = following

    def _may_join(self, seq: Sequence) -> bool:
        """Whether the step has room for the sequence's variant."""
        if seq.delta is not None and len(self.variants) < self.scheduler.max_variants_per_step:
            self.variants.add(seq.delta)
        return self._served_now(seq)


def _next_eligible(queue: Iterator[Sequence]) -> Sequence | None:
    """The next that need not wait for a leader's prompt to be computed."""
    return next((s for s in queue if s.leader is None or s.leader.prompt_done), None)
