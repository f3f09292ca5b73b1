"""What the engine asks of whatever computes its steps: launch one, and hand over its results when it has run.

A runner of depth 0 has computed a step when `launch` returns. A runner of depth 1 returns while its device still works,
and takes the next step before the results of this one are fetched: a token that the host has not seen is taken from
the device's own memory of the last step. Steps run in the order of their launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bitdelta_core.engine.api import SamplingParams
from bitdelta_core.engine.sampler import LogprobRow, RowState, Sample
from bitdelta_core.engine.scheduler import Work
from bitdelta_core.engine.variants import Variant


@dataclass(frozen=True, slots=True)
class Task:
    """One sequence's part of a step."""

    work: Work
    state: RowState
    """How the sequence samples."""
    variant: Variant
    weights: Any = None
    """Of its variant, as its residency published them; None: the base."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step brought to one task."""

    sample: Sample | None = None
    """Where the task's work samples."""
    prompt_logprobs: Sequence[LogprobRow] = ()
    """Where the work wants them: of the prompt tokens at positions start + 1 and following."""


class Pending(Protocol):
    """A launched step."""

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        ...

    def result(self) -> Sequence[Outcome]:
        """One per task. Waits for the device; called once, in the order of the launches."""
        ...


class Runner(Protocol):
    """Owns the decoder, the KV cache and the sampler."""

    @property
    def depth(self) -> int:
        """How many launched steps may wait for their results while the next one is launched: 0 or 1."""
        ...

    def launch(self, tasks: Sequence[Task]) -> Pending:
        """Compute the tasks' rows. They are sorted by slot and not empty."""
        ...

    def is_synchronous(self, params: SamplingParams) -> bool:
        """Whether a sequence that samples like this can be launched only when the host knows all of its tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """The results of a step that ran inside `launch`."""

    outcomes: Sequence[Outcome]

    def ready(self) -> bool:
        return True

    def result(self) -> Sequence[Outcome]:
        return self.outcomes
