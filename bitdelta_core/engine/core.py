"""The engine without its thread: requests in, one `step()` after the other, events out. Not thread-safe.

Life of a request here:  add -> (its delta is wanted -> READY -> pinned) -> scheduled -> ... -> every choice has ended.
Whatever ends it, `_end` gives back its blocks, its pin and its want, once.

Life of a step:  planned -> launched -> collected. As many launched steps wait to be collected as the runner's `depth`
says: with 1, a step is planned and launched while the one before still runs. What ends a choice is then seen one step
late, and the token that the later step brings for it is dropped. Blocks change hands in the order of the launches,
which is the order in which steps run; the bytes of a delta are overwritten from beside, so a pin outlives its job until
every step that reads them has been collected.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import dataclass, field

from bitdelta_core.engine.api import EngineStats, GenerationRequest, TokenEvent
from bitdelta_core.engine.choice import Choice
from bitdelta_core.engine.compilations import compilations
from bitdelta_core.engine.residency import Residency, Resident, State
from bitdelta_core.engine.runner import Outcome, Pending, Runner, Task
from bitdelta_core.engine.sampler import Sample
from bitdelta_core.engine.scheduler import Scheduler, Work
from bitdelta_core.engine.sequence import Sequence
from bitdelta_core.engine.variants import Variant
from bitdelta_core.errors import BitDeltaError, CheckpointError, ContextLengthExceeded, DeltaError, InvalidRequest

Deliver = Callable[[TokenEvent | BitDeltaError], None]
"""Takes the events of one request; an error is the last thing it gets."""


@dataclass(eq=False, slots=True)
class Job:
    """One request under way."""

    request: GenerationRequest
    deliver: Deliver
    seed: int
    arrival: int = 0
    resident: Resident | None = None
    pinned: bool = False
    choices: list[Choice] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Launched:
    """A step whose results have not been collected."""

    work: tuple[Work, ...]
    jobs: tuple[Job, ...]
    """Of each work."""
    pending: Pending
    unpin: list[Resident] = field(default_factory=list)
    """Of jobs that have ended since the launch: their deltas stay until the step is collected."""


class EngineCore:
    """All state of a running engine."""

    def __init__(
        self,
        base: Variant,
        runner: Runner,
        scheduler: Scheduler,
        residency: Residency,
        *,
        max_model_len: int,
        slab_patience_s: float,
    ) -> None:
        self.scheduler = scheduler
        self.residency = residency
        self._base = base
        self._runner = runner
        self._patience_s = slab_patience_s
        self._max_model_len = max_model_len
        self._jobs: dict[str, Job] = {}
        self._unpinned: list[Job] = []
        """Jobs whose delta is not pinned yet, by arrival."""
        self._choices: dict[Sequence, tuple[Job, Choice]] = {}
        self._launched: deque[Launched] = deque()
        """Oldest first."""
        self._arrivals = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0

    def add(self, job: Job) -> None:
        """Take a request on. Errors go to its own `deliver`."""
        self._arrivals += 1
        job.arrival = self._arrivals
        self._jobs[job.request.request_id] = job
        try:
            if job.request.delta is None:
                self._activate(job, self._base, slot=-1)
            else:
                job.resident = self.residency.want(job.request.delta, job.arrival)
                self._unpinned.append(job)
        except BitDeltaError as error:
            self._fail(job, error)

    def abort(self, request_id: str) -> None:
        """Forget a request; nothing more is delivered. Unknown or finished ones are ignored."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job)

    def step(self) -> bool:
        """Let loads proceed, launch one batch, collect those before it. False: there was nothing to do."""
        for resident in self.residency.collect():
            if resident.state is State.FAILED:
                self._fail_all(resident)
        self._pin_ready()
        self.residency.advance()
        plan = self.scheduler.plan()
        busy = bool(plan or self._launched)
        assert busy or not self.scheduler.running, "running sequences, but nothing to do"
        if plan:
            self.scheduler.commit(plan)
        if plan.work:
            self._launch(plan.work)
        while len(self._launched) > (self._runner.depth if plan.work else 0):
            self._collect(self._launched.popleft())
        return busy

    def end_all(self, error: BitDeltaError) -> None:
        """The engine stops: everybody is told, even when the state is what broke."""
        while self._launched:
            with suppress(Exception):
                self._launched.popleft().pending.result()  # nothing is freed that the device still reads
        for job in list(self._jobs.values()):
            with suppress(Exception):
                self._end(job)
            job.deliver(error)

    def stats(self) -> EngineStats:
        slab, blocks, compiled = self.residency.slab, self.scheduler.blocks, compilations()
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            waiting_for_delta=len(self._unpinned),
            kv_blocks_total=blocks.total,
            kv_blocks_used=blocks.used,
            slab_bytes_total=slab.nbytes,
            slab_bytes_used=slab.used,
            resident=self.residency.ready,
            pinned=slab.pinned,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generated_tokens,
            prefix_cache_queries_total=self.scheduler.prefix_queries,
            prefix_cache_hits_total=self.scheduler.prefix_hits,
            preemptions_total=self.scheduler.preemptions,
            delta_loads_total=self.residency.loads,
            delta_load_failures_total=self.residency.failures,
            delta_evictions_total=self.residency.evictions,
            steps_total=self.scheduler.step,
            kernels_compiled_total=compiled.kernels,
            kernel_compile_seconds_total=compiled.seconds,
        )

    def check_integrity(self) -> None:
        """Assert that scheduler, blocks, slab and jobs agree."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()
        scheduled = {*self.scheduler.running, *self.scheduler.waiting()}
        assert scheduled == set(self._choices), "scheduled sequences and open choices differ"
        assert all(job in self._jobs.values() for job, _ in self._choices.values())
        self._check_launched()
        pins = [job.resident for job in self._jobs.values() if job.pinned]
        pins += [resident for launched in self._launched for resident in launched.unpin]
        for resident in pins:
            assert resident is not None
            assert resident.state is State.READY, "a pinned delta is not READY"
            assert self.residency.slab.pins(resident.delta) == pins.count(resident), "pins are not the jobs'"
        assert {r.delta for r in pins if r} == set(self.residency.slab.pinned) - self.residency.staging()
        assert [j for j in self._jobs.values() if j.resident and not j.pinned] == self._unpinned

    def _check_launched(self) -> None:
        assert len(self._launched) <= self._runner.depth, "a step is overdue"
        read = {job.resident.delta for launched in self._launched for job in launched.jobs if job.resident}
        assert read <= set(self.residency.slab.pinned), "a launched step reads a delta that may be overwritten"
        under_way = [work for launched in self._launched for work in launched.work]
        unseen = Counter(work.seq for work in under_way if work.samples)
        working = {work.seq for work in under_way}
        for seq in self._choices:
            assert seq.unseen == unseen[seq], "unseen tokens are not those of the launched steps"
            assert seq.admitted or not seq.unseen, "a waiting sequence has a token that nobody knows"
            full = 0 if seq in working else seq.computed // self.scheduler.blocks.block_size
            assert full <= len(seq.chain), "a full block is not findable"

    def _pin_ready(self) -> None:
        """Pin for those whose delta is READY, unless an older request has waited too long for room."""
        if not self._unpinned:
            return
        blocked = self.residency.blocked()
        limit = blocked[1] if blocked is not None and blocked[0] >= self._patience_s else float("inf")
        for job in [j for j in self._unpinned if j.resident and j.resident.state is State.READY and j.arrival <= limit]:
            assert job.resident is not None
            assert job.resident.variant is not None
            self._unpinned.remove(job)
            slot = self.residency.pin(job.resident, job.arrival)
            job.pinned = True
            try:
                self._activate(job, job.resident.variant, slot)
            except BitDeltaError as error:
                self._fail(job, error)

    def _activate(self, job: Job, variant: Variant, slot: int) -> None:
        """The variant is at hand: check the request against it and schedule its choices."""
        request = job.request
        max_len = self._max_len(request, variant)
        leader: Sequence | None = None
        for index in range(request.params.n):
            seq = Sequence(
                request=request,
                arrival=job.arrival * 256 + index,
                index=index,
                tokens=list(request.prompt_token_ids),
                max_len=max_len,
                slot=slot,
                leader=leader,
                synchronous=self._runner.is_synchronous(request.params),
            )
            leader = leader or seq
            choice = Choice(seq, variant, seed=job.seed)
            job.choices.append(choice)
            self._choices[seq] = (job, choice)
            self.scheduler.add(seq)
        self._prompt_tokens += len(request.prompt_token_ids)

    def _max_len(self, request: GenerationRequest, variant: Variant) -> int:
        prompt, params = len(request.prompt_token_ids), request.params
        limit = min(variant.context_len, self._max_model_len)
        wanted = prompt + (params.max_tokens or 1)
        if wanted > limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens. However, you requested {wanted} tokens "
                f"({prompt} in the prompt, {params.max_tokens or 'at least 1'} for the completion).",
                param="max_tokens" if prompt < limit else "prompt",
            )
        for name, ids in (("prompt", request.prompt_token_ids), ("logit_bias", params.logit_bias)):
            if max(ids, default=0) >= variant.vocab_size or min(ids, default=0) < 0:
                raise InvalidRequest(f"{name} has token ids outside 0..{variant.vocab_size - 1}", param=name)
        return limit if params.max_tokens is None else wanted

    def _launch(self, work: tuple[Work, ...]) -> None:
        owners = [self._choices[w.seq] for w in work]
        tasks = [
            Task(w, choice.state, choice.variant, None if job.resident is None else job.resident.weights)
            for w, (job, choice) in zip(work, owners, strict=True)
        ]
        self._launched.append(Launched(work, tuple(job for job, _ in owners), self._runner.launch(tasks)))

    def _collect(self, launched: Launched) -> None:
        """Wait for a step, and hand on what it brought to those that are still there."""
        outcomes = launched.pending.result()
        self._give_prompt_logprobs(launched.work, outcomes)
        for w in launched.work:
            if w.seq in self._choices:
                self.scheduler.advance(w)
        for w, outcome in zip(launched.work, outcomes, strict=True):
            if w.seq not in self._choices or outcome.sample is None:
                continue  # it has ended since the launch, by itself or with its request
            job, choice = self._choices[w.seq]
            if outcome.sample.finite:
                self._accept(job, choice, outcome.sample)
            else:
                self._fail(job, _not_finite(w.seq))
        for resident in launched.unpin:
            self.residency.unpin(resident)

    def _give_prompt_logprobs(self, work: tuple[Work, ...], outcomes: Many[Outcome]) -> None:
        for w, outcome in zip(work, outcomes, strict=True):
            if not w.prompt_logprobs or w.seq not in self._choices:
                continue
            job, choice = self._choices[w.seq]
            try:
                if outcome.prompt_logprobs:
                    choice.add_prompt_logprobs(w.start, outcome.prompt_logprobs)
                if w.stop >= w.seq.prompt_len:
                    job.deliver(choice.prompt_event())
            except BitDeltaError as error:
                self._fail(job, error)

    def _accept(self, job: Job, choice: Choice, sample: Sample) -> None:
        try:
            event = choice.accept(sample)
        except BitDeltaError as error:
            self._fail(job, error)
            return
        self._generated_tokens += 1
        if event.finish_reason is not None:
            self._close(choice)
            if not any(c.seq in self._choices for c in job.choices):
                self._end(job)
        job.deliver(event)

    def _close(self, choice: Choice) -> None:
        del self._choices[choice.seq]
        self.scheduler.remove(choice.seq)

    def _fail(self, job: Job, error: BitDeltaError) -> None:
        try:
            self._end(job)
        finally:
            job.deliver(error.with_traceback(None))  # of an error that is kept, tracebacks would keep frames, too

    def _fail_all(self, resident: Resident) -> None:
        assert resident.error is not None
        for job in [j for j in self._unpinned if j.resident is resident]:
            self._fail(job, resident.error)

    def _end(self, job: Job) -> None:
        """The only way out: whatever the request still holds is given back."""
        del self._jobs[job.request.request_id]
        for choice in job.choices:
            if choice.seq in self._choices:
                self._close(choice)
        if job.resident is not None:
            if job.pinned:
                self._unpin(job, job.resident)
            else:
                self._unpinned.remove(job)
                self.residency.unwant(job.resident, job.arrival)

    def _unpin(self, job: Job, resident: Resident) -> None:
        """Now, or when the last launched step that reads the delta for this job has been collected."""
        reading = [launched for launched in self._launched if job in launched.jobs]
        if reading:
            reading[-1].unpin.append(resident)
        else:
            self.residency.unpin(resident)


def _not_finite(seq: Sequence) -> BitDeltaError:
    what = f"at position {len(seq.tokens)} no token has a finite probability: the weights hold NaN or infinity"
    if seq.delta is None:
        return CheckpointError(f"base: {what}, or logit_bias excludes every token")
    return DeltaError(f"{what}, or logit_bias excludes every token", delta=seq.delta)
