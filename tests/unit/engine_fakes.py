"""A model so small that every answer can be worked out by hand, and so strict that any mix-up changes it.

The next token is a hash of the variant's salt and of the whole context, which the decoder reads back from the KV cache
through the block table. The salt is read from the slab. A wrong block, a stale extent, a foreign slot: another answer.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitdelta_core.engine.accelerator import Accelerator, Plain
from bitdelta_core.engine.api import GenerationRequest, SamplingParams, TokenEvent
from bitdelta_core.engine.blocks import BlockManager
from bitdelta_core.engine.core import EngineCore, Job
from bitdelta_core.engine.host_buffers import HostBuffer
from bitdelta_core.engine.residency import Residency
from bitdelta_core.engine.runner import Outcome, Task
from bitdelta_core.engine.scheduler import Scheduler
from bitdelta_core.engine.sequence import Sequence as EngineSequence
from bitdelta_core.engine.slab import Slab
from bitdelta_core.engine.torch_runner import TorchRunner
from bitdelta_core.engine.variants import Variant
from bitdelta_core.engine.vocabulary import Vocabulary
from bitdelta_core.errors import BitDeltaError
from bitdelta_core.models.batch import Batch
from bitdelta_core.models.device.kinds import StepKinds
from kernels.device import Kinds
from kernels.segments import check_segments

VOCAB = 26
BASE_SALT = 0
POISON = 249
"""Salt of a variant whose logits are NaN."""
RUNNERS = ("torch", "late", "device")
"""At once; a step behind, in torch; a step behind, through the device runner."""
RUNNER = "torch"
"""Of worlds that do not say."""


def salt_of(delta: str | None) -> int:
    return BASE_SALT if delta is None else 1 + int(delta, 16) % 240


def next_token(salt: int, context: Sequence[int]) -> int:
    digest = hashlib.sha256(bytes([salt, *context])).digest()
    return digest[0] % VOCAB


def answer(delta: str | None, prompt: Sequence[int], count: int) -> list[int]:
    """What greedy decoding gives."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(salt_of(delta), context))
    return context[len(prompt) :]


def salt_in(extent: torch.Tensor | None) -> int:
    """Whose bytes an extent holds."""
    assert extent is not None
    assert (extent == extent[0]).all(), "an extent was overwritten in part"
    return int(extent[0])


def logits_of(kv: torch.Tensor, table_M: np.ndarray, position: int, salt: int, block_size: int) -> np.ndarray:
    """Of the row at `position`, whose context is read back from the KV cache."""
    at = np.arange(position + 1)
    blocks = table_M[at // block_size]
    assert (blocks > 0).all(), "block 0 was given to a sequence"
    stored = kv.numpy()[blocks * block_size + at % block_size]
    assert (stored // 1000 == salt).all(), "K and V of another variant"
    if salt == POISON:
        return np.full(VOCAB, np.nan)
    logits = np.zeros(VOCAB)
    logits[next_token(salt, (stored % 1000).tolist())] = 5.0
    return logits


class FakeDecoder:
    """KV is one int64 per token: salt * 1000 + token."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.rows_computed = 0
        self.base_salt = BASE_SALT
        self.before_forward: Callable[[], None] = lambda: None

    def forward(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        self.before_forward()
        self.rows_computed += batch.rows
        check_segments(batch.segments, batch.rows)
        check_segments(batch.logit_segments, batch.logit_rows_L.shape[0])
        assert set(batch.variants) == {s.slot for s in batch.segments if s.slot >= 0}
        salts = [self._salt(batch, s.slot) for s in batch.segments for _ in range(s.rows)]
        kv[batch.kv_slots_T] = torch.tensor(salts) * 1000 + batch.token_ids_T
        wanted = set(batch.logit_rows_L.tolist())
        logits = [
            self._logits(batch, kv, s, row, salts[row])
            for s, (start, stop) in enumerate(zip(batch.query_starts, batch.query_starts[1:], strict=False))
            for row in range(start, stop)
            if row in wanted
        ]
        return torch.tensor(np.array(logits, np.float32).reshape(len(logits), VOCAB))

    def _salt(self, batch: Batch, slot: int) -> int:
        return self.base_salt if slot < 0 else salt_in(batch.variants[slot].vectors)

    def _logits(self, batch: Batch, kv: torch.Tensor, s: int, row: int, salt: int) -> np.ndarray:
        position = int(batch.positions_T[row])
        assert position < batch.context_lens[s]
        return logits_of(kv, batch.block_tables_SM[s].numpy(), position, salt, self.block_size)


class LateRunner(TorchRunner):
    """A device that is as late as can be: a step runs when its results are fetched, and not before.

    It reads KV, slab and the last step's tokens then; what was planned meanwhile must not have spoilt them.
    """

    depth = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: LateStep | None = None

    def is_synchronous(self, params: SamplingParams) -> bool:
        return params.repetition_penalty != 1

    def launch(self, tasks: Sequence[Task]) -> LateStep:
        assert not any(t.work.seq.synchronous and t.work.stop > len(t.work.seq.tokens) for t in tasks)
        before = None if self._last is None else self._last.before
        assert before is None or before.ready(), "three steps at once"
        self._last = LateStep(self, tasks, self.batch(tasks), self._last)
        return self._last


class LateStep:
    def __init__(self, runner: LateRunner, tasks: Sequence[Task], batch: Batch, before: LateStep | None) -> None:
        self.outcomes: list[Outcome] | None = None
        self.before = before
        self._runner, self._tasks, self._batch = runner, tasks, batch
        ends = batch.query_starts[1:]
        self._unseen = [
            (end - 1, t.work.seq) for end, t in zip(ends, tasks, strict=True) if t.work.stop > len(t.work.seq.tokens)
        ]

    def ready(self) -> bool:
        return self.outcomes is not None

    def result(self) -> list[Outcome]:
        assert self.outcomes is None, "fetched twice"
        for row, seq in self._unseen:
            assert self.before is not None
            self._batch.token_ids_T[row] = self.before.token(seq)
        self.before = None
        self.outcomes = self._runner.compute(self._tasks, self._batch)
        return self.outcomes

    def token(self, seq: EngineSequence) -> int:
        """What this step has sampled for a sequence."""
        assert self.outcomes is not None, "out of order"
        [sample] = [o.sample for t, o in zip(self._tasks, self.outcomes, strict=True) if t.work.seq is seq]
        assert sample is not None
        return sample.token_id


class FakeTokenizer:
    """Token i is the i-th letter."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(97 + i) for i in ids)


@dataclass(frozen=True)
class FakeWeights:
    vectors: torch.Tensor
    kinds: StepKinds


KINDS = (StepKinds(), StepKinds(layers=Kinds(signs=True)), StepKinds(Kinds(signs=True, rank=16), Kinds(rows=True)))


class FakeDelta:
    def __init__(self, delta: str, nbytes: int, salt: int, context_len: int) -> None:
        self.nbytes = nbytes
        self.variant = Variant(context_len, VOCAB, Vocabulary(FakeTokenizer(), frozenset()))
        self._salt = salt

    def fill(self, host: HostBuffer) -> None:
        host.bytes_.fill_(self._salt)

    def view(self, extent: torch.Tensor) -> FakeWeights:
        return FakeWeights(extent, KINDS[self._salt % len(KINDS)])


class FakeSource:
    """Opens deltas by name; can be told to fail, to be large, poisoned, or to block."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.sizes: dict[str, int] = {}
        self.salts: dict[str, int] = {}
        self.errors: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.opened: list[str] = []

    def open(self, delta: str) -> FakeDelta:
        self.opened.append(delta)
        if delta in self.gates:
            assert self.gates[delta].wait(30)
        if delta in self.errors:
            raise self.errors[delta]
        return FakeDelta(delta, self.sizes.get(delta, self.nbytes), self.salts.get(delta, salt_of(delta)), 64)


class World:
    """An EngineCore over fakes, stepped by hand."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_variants_per_step: int = 8,
        prefix_caching: bool = True,
        slab_bytes: int = 4096,
        delta_bytes: int = 1024,
        patience_s: float = 0.0,
        retry_s: float = 60.0,
        host_cache_bytes: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        runner: str | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.source = FakeSource(delta_bytes)
        self.woken = threading.Event()
        self.tables: Any = None
        self.runner: Any
        accelerator = accelerator or Plain(torch.device("cpu"))
        if (runner or RUNNER) == "device":
            from tests.unit.engine_device_fakes import device_runner

            limits = (blocks, block_size, max_num_seqs, max_num_batched_tokens)
            self.runner, self.tables, self.decoder, accelerator = device_runner(*limits)
        else:
            kv = torch.zeros(blocks * block_size, dtype=torch.int64)
            self.decoder = FakeDecoder(block_size)
            make = TorchRunner if (runner or RUNNER) == "torch" else LateRunner
            self.runner = make(self.decoder, kv, block_size=block_size, device=torch.device("cpu"))
        self.core = EngineCore(
            Variant(48, VOCAB, Vocabulary(FakeTokenizer(), stop_ids)),
            self.runner,
            Scheduler(
                BlockManager(blocks, block_size, prefix_caching=prefix_caching),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_variants_per_step=max_variants_per_step,
            ),
            Residency(
                Slab(slab_bytes),
                self.source.open,
                self.woken.set,
                accelerator=accelerator,
                tables=self.tables,
                fetch_threads=4,
                load_threads=2,
                host_cache_bytes=host_cache_bytes,
                retry_s=retry_s,
            ),
            max_model_len=(blocks - 1) * block_size,
            slab_patience_s=patience_s,
        )
        self.events: dict[str, list[TokenEvent]] = {}
        self.errors: dict[str, BitDeltaError] = {}

    def ask(
        self,
        name: str,
        prompt: Sequence[int],
        *,
        delta: str | None = None,
        tenant: str = "",
        seed: int = 0,
        **params: Any,
    ) -> None:
        given = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **params})
        request = GenerationRequest(
            request_id=name, prompt_token_ids=tuple(prompt), delta=delta, tenant=tenant, params=given
        )
        self.events[name] = []

        def deliver(event: TokenEvent | BitDeltaError) -> None:
            assert name not in self.errors, "something was delivered after the error"
            if isinstance(event, BitDeltaError):
                self.errors[name] = event
            else:
                self.events[name].append(event)

        self.core.add(Job(request, deliver, seed))

    def step(self) -> bool:
        busy = self.core.step()
        self.core.check_integrity()
        if self.tables is not None:
            self.runner.check_integrity()
        return busy

    def finished(self, name: str) -> bool:
        ended = [e for e in self.events[name] if e.finish_reason is not None]
        return name in self.errors or (bool(ended) and name not in self.core._jobs)

    def run(self, *names: str) -> None:
        """Step until all (or the named) requests have ended. A loader thread's news is waited for, never polled."""
        self.run_until(lambda: all(self.finished(name) for name in names or self.events))

    def run_until(self, reached: Callable[[], bool]) -> None:
        for _ in range(3000):
            if reached():
                return
            self.woken.clear()
            if not self.step() and not reached():
                assert self.woken.wait(20), f"stuck: {self.core.stats()}"
        raise AssertionError(f"not reached: {self.core.stats()}")

    def tokens(self, name: str, index: int = 0) -> list[int]:
        return [t for e in self.events[name] if e.index == index for t in e.token_ids]

    def text(self, name: str, index: int = 0) -> str:
        return "".join(e.text for e in self.events[name] if e.index == index)

    def last(self, name: str, index: int = 0) -> TokenEvent:
        return [e for e in self.events[name] if e.index == index][-1]

    def assert_idle(self) -> None:
        """Nothing is held any more: no block, no pin, no want, once what is under way has ended."""
        self.run_until(lambda: not self.core.residency.staging() and not self.core._launched)
        self.core.check_integrity()
        stats = self.core.stats()
        assert (stats.kv_blocks_used, stats.pinned, stats.running, stats.waiting) == (0, (), 0, 0)
        assert stats.waiting_for_delta == 0
        assert not self.core._jobs
        assert not self.core._choices
