"""The engine without its thread: requests in, one `step()` after the other, events out. Not thread-safe.

Life of a request here:  add -> (its delta is wanted -> READY -> pinned) -> scheduled -> ... -> every choice has ended.
Whatever ends it, `_end` gives back its blocks, its pin and its want, once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from bitdelta_core.engine.api import EngineStats, GenerationRequest, TokenEvent
from bitdelta_core.engine.choice import Choice
from bitdelta_core.engine.residency import Residency, Resident, State
from bitdelta_core.engine.runner import Computed, Runner
from bitdelta_core.engine.sampler import logprob_rows, sample
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
        """Let loads proceed and compute one batch. False: there was nothing to compute."""
        for resident in self.residency.collect():
            if resident.state is State.FAILED:
                self._fail_all(resident)
        self._pin_ready()
        self.residency.advance()
        plan = self.scheduler.plan()
        if not plan:
            assert not self.scheduler.running, "running sequences, but nothing to do"
            return False
        self.scheduler.commit(plan)
        if plan.work:
            self._compute(plan.work)
        return True

    def end_all(self, error: BitDeltaError) -> None:
        """The engine stops: everybody is told, even when the state is what broke."""
        for job in list(self._jobs.values()):
            with suppress(Exception):
                self._end(job)
            job.deliver(error)

    def stats(self) -> EngineStats:
        slab, blocks = self.residency.slab, self.scheduler.blocks
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
        )

    def check_integrity(self) -> None:
        """Assert that scheduler, blocks, slab and jobs agree."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()
        scheduled = {*self.scheduler.running, *self.scheduler.waiting()}
        assert scheduled == set(self._choices), "scheduled sequences and open choices differ"
        assert all(job in self._jobs.values() for job, _ in self._choices.values())
        pins = [job.resident for job in self._jobs.values() if job.pinned]
        for resident in pins:
            assert resident is not None
            assert resident.state is State.READY, "a pinned delta is not READY"
            assert self.residency.slab.pins(resident.delta) == pins.count(resident), "pins are not the jobs'"
        assert {r.delta for r in pins if r} == set(self.residency.slab.pinned) - self.residency.staging()
        assert [j for j in self._jobs.values() if j.resident and not j.pinned] == self._unpinned

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

    @torch.inference_mode()
    def _compute(self, work: tuple[Work, ...]) -> None:
        slots = {job.resident.slot: job.resident.weights for w in work if (job := self._choices[w.seq][0]).resident}
        computed = self._runner.run(work, {slot: weights for slot, weights in slots.items() if weights is not None})
        self._give_prompt_logprobs(work, computed)
        for w in work:
            self.scheduler.advance(w)
        sampling = [(w, rows.stop - 1) for w, rows in zip(work, computed.rows, strict=True) if w.samples]
        logits_LV = computed.logits_LV
        if len(sampling) != logits_LV.shape[0]:
            logits_LV = logits_LV[[row for _, row in sampling]]
        if not sampling:
            return
        samples = sample(logits_LV, [self._choices[w.seq][1].row for w, _ in sampling])
        for (w, _), drawn in zip(sampling, samples, strict=True):
            if w.seq not in self._choices:
                continue  # another choice of its request has just failed
            job, choice = self._choices[w.seq]
            if drawn.finite:
                self._accept(job, choice, choice.accept(drawn))
            else:
                self._fail(job, _not_finite(w.seq))

    def _give_prompt_logprobs(self, work: tuple[Work, ...], computed: Computed) -> None:
        for w, rows in zip(work, computed.rows, strict=True):
            if not w.seq.wants_prompt_logprobs:
                continue
            job, choice = self._choices[w.seq]
            following = w.seq.tokens[w.start + 1 : w.start + w.rows + 1]
            logits_LV = computed.logits_LV[rows.start : rows.start + len(following)]
            if following:
                choice.add_prompt_logprobs(
                    w.start, logprob_rows(logits_LV, following, w.seq.request.params.prompt_logprobs or 0)
                )
            if w.start + w.rows >= w.seq.prompt_len:
                job.deliver(choice.prompt_event())

    def _accept(self, job: Job, choice: Choice, event: TokenEvent) -> None:
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
            job.deliver(error)

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
                self.residency.unpin(job.resident)
            else:
                self._unpinned.remove(job)
                self.residency.unwant(job.resident, job.arrival)


def _not_finite(seq: Sequence) -> BitDeltaError:
    what = f"at position {len(seq.tokens)} no token has a finite probability: the weights hold NaN or infinity"
    if seq.delta is None:
        return CheckpointError(f"base: {what}, or logit_bias excludes every token")
    return DeltaError(f"{what}, or logit_bias excludes every token", delta=seq.delta)
