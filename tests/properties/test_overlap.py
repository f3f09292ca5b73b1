"""The same requests through a runner that computes at once and one that is a step behind: the same tokens for each.

The second is as late as can be (`LateRunner`): whatever is freed, overwritten or forgotten too early spoils an answer.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bitdelta_core.errors import DeltaFormatError
from tests.unit.engine_fakes import POISON, World, next_token, salt_of

DELTAS = (None, "0a", "0b", "0c", "0d")
BROKEN, POISONED = "0e", "0f"
STOPS = frozenset({7, 19})


class Overlap(RuleBasedStateMachine):
    """`worlds[d]` has depth d. Both are asked the same; each goes its own way."""

    @initialize(
        blocks=st.integers(9, 24),
        seqs=st.integers(1, 5),
        extra=st.integers(0, 9),
        variants=st.integers(1, 3),
        slab=st.integers(1, 3),
        caching=st.booleans(),
    )
    def start(self, blocks: int, seqs: int, extra: int, variants: int, slab: int, caching: bool) -> None:
        limits: dict[str, Any] = {
            "blocks": blocks,
            "max_num_seqs": seqs,
            "max_num_batched_tokens": seqs + extra,
            "max_variants_per_step": variants,
            "slab_bytes": 1024 * slab,
            "prefix_caching": caching,
            "stop_ids": STOPS,
        }
        self.worlds = [World(depth=depth, **limits) for depth in (0, 1)]
        for world in self.worlds:
            world.source.errors[BROKEN] = DeltaFormatError("truncated", delta=BROKEN)
            world.source.salts[POISONED] = POISON
        self.asked: dict[str, tuple[str | None, list[int], dict[str, Any]]] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        count=st.integers(1, 9),
        delta=st.sampled_from([*DELTAS, *DELTAS, BROKEN, POISONED]),
        n=st.integers(1, 3),
        params=st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 1.5]),
                "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
                "ignore_eos": st.booleans(),
                "min_tokens": st.sampled_from([0, 0, 1]),
                "prompt_logprobs": st.sampled_from([None, None, 1]),
                "stop": st.sampled_from([(), ("ab",), ("q",)]),
            }
        ),
    )
    def ask(self, prompt: list[int], count: int, delta: str | None, n: int, params: dict[str, Any]) -> None:
        name = f"r{len(self.asked)}"
        self.asked[name] = (delta, prompt, params)
        for world in self.worlds:
            world.ask(name, prompt, delta=delta, n=n, seed=3, max_tokens=count, **params)

    @precondition(lambda self: self.asked)
    @rule(steps=st.tuples(st.integers(0, 4), st.integers(0, 4)))
    def step(self, steps: tuple[int, int]) -> None:
        for world, count in zip(self.worlds, steps, strict=True):
            for _ in range(count):
                world.step()

    @precondition(lambda self: self.asked.keys() - self.aborted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked.keys() - self.aborted)))
        self.aborted.add(name)
        for world in self.worlds:
            world.core.abort(name)
            world.core.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "worlds"):
            return
        for world in self.worlds:
            kept = [name for name in self.asked if name not in self.aborted]
            world.run_until(lambda world=world, kept=kept: all(world.finished(name) for name in kept))
            world.assert_idle()
            world.core.residency.close()
        for name in self.asked:
            self.check(name)

    def check(self, name: str) -> None:
        delta, prompt, params = self.asked[name]
        early, late = self.worlds
        if name in self.aborted:
            return
        assert (name in early.errors) == (name in late.errors) == (delta in (BROKEN, POISONED))
        if name in early.errors:
            return
        for index in {event.index for event in early.events[name]}:
            assert late.tokens(name, index) == early.tokens(name, index)
            assert late.text(name, index) == early.text(name, index)
            assert late.last(name, index).finish_reason == early.last(name, index).finish_reason
        assert [e.prompt_logprobs for e in late.events[name] if e.prompt_logprobs] == [
            e.prompt_logprobs for e in early.events[name] if e.prompt_logprobs
        ]
        if params["temperature"] == 0 and params["repetition_penalty"] == 1 and not params["min_tokens"]:
            context = list(prompt)
            for token in early.tokens(name):
                assert token == next_token(salt_of(delta), context), "another variant's token"
                context.append(token)


TestOverlap = Overlap.TestCase
TestOverlap.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
