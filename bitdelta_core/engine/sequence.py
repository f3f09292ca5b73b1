"""One choice of one request, as the engine works on it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from bitdelta_core.engine.api import GenerationRequest
from kernels.segments import BASE


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """Tokens so far and what the engine holds for them. Only the engine's thread touches it."""

    request: GenerationRequest
    arrival: int
    """Unique; smaller came earlier."""
    index: int = 0
    """Which of the request's n choices."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and generated tokens, as far as the host knows them."""
    unseen: int = 0
    """Tokens that launched steps have sampled or will sample; the host reads them when it collects the step."""
    max_len: int = 0
    """`length` at which generation ends for length."""
    slot: int = BASE
    """Of the variant, while its delta is pinned."""
    leader: Sequence | None = None
    """The choice whose prompt blocks this one shares."""

    synchronous: bool = False
    """Its next row needs the host to know all of its tokens."""

    table: array[int] = field(default_factory=lambda: array("i"))
    """Its blocks, in order. Read by numpy without a copy."""
    computed: int = 0
    """Tokens whose K and V stand in the blocks of `table`, once all launched steps have run."""
    chain: list[bytes] = field(default_factory=list)
    """Keys of the full blocks so far."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    prompt_done: bool = False
    admitted: bool = False
    preemptions: int = 0
    charged: int = 0
    """Tokens that its tenant has paid for; recomputing after a preemption is free."""
    ready_step: int = 0
    """The step at which it became schedulable."""

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def delta(self) -> str | None:
        return self.request.delta

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def length(self) -> int:
        """Tokens that it has, those that the host has not seen included."""
        return len(self.tokens) + self.unseen

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return self.length - self.computed

    @property
    def can_go_on(self) -> bool:
        """Whether the next step may compute rows of it, before the last one is collected."""
        return self.length < self.max_len and not (self.synchronous and self.unseen)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Then no prompt token may come from the prefix cache: its logits are needed."""
        return self.request.params.prompt_logprobs is not None and self.index == 0 and not self.prompt_done

    def receive(self, token: int) -> None:
        """The host learns of the oldest unseen token."""
        self.unseen -= 1
        self.tokens.append(token)

    def forget_blocks(self) -> array[int]:
        """Back to nothing computed. Returns the blocks to release."""
        table, self.table = self.table, array("i")
        self.computed = 0
        self.chain = []
        return table
