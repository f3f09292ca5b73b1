"""The same requests through a runner that computes at once and two that are a step behind: the same tokens for each.

One is as late as can be (`LateRunner`): whatever is freed, overwritten or forgotten too early spoils an answer. The
other is the device runner over a fake decoder.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bitdelta_core.engine.api import TokenEvent
from bitdelta_core.errors import DeltaFormatError
from tests.unit.engine_fakes import POISON, RUNNERS, World, next_token, salt_of

DELTAS = (None, "0a", "0b", "0c", "0d")
BROKEN, POISONED = "0e", "0f"
STOPS = frozenset({7, 19})


class Overlap(RuleBasedStateMachine):
    """All worlds are asked the same; each goes its own way."""

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
        self.worlds = [World(runner=runner, **limits) for runner in RUNNERS]
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
                "logprobs": st.sampled_from([None, None, 0, 2]),
                "logit_bias": st.sampled_from([{}, {}, {7: 6.0}]),
            }
        ),
    )
    def ask(self, prompt: list[int], count: int, delta: str | None, n: int, params: dict[str, Any]) -> None:
        name = f"r{len(self.asked)}"
        self.asked[name] = (delta, prompt, params)
        for world in self.worlds:
            world.ask(name, prompt, delta=delta, n=n, seed=3, max_tokens=count, **params)

    @precondition(lambda self: self.asked)
    @rule(steps=st.tuples(*[st.integers(0, 4)] * len(RUNNERS)))
    def step(self, steps: tuple[int, ...]) -> None:
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
        if name in self.aborted:
            return
        early, late, device = self.worlds
        assert all((name in world.errors) == (delta in (BROKEN, POISONED)) for world in self.worlds)
        if name in early.errors:
            return
        self.compare(name, early, late)
        self.compare(name, early, device)
        if params["temperature"] == 0 and params["repetition_penalty"] == 1 and not params["min_tokens"]:
            self.check_greedy(delta, prompt, params["logit_bias"], early.tokens(name))

    def compare(self, name: str, one: World, other: World) -> None:
        for index in {event.index for event in one.events[name]}:
            assert other.tokens(name, index) == one.tokens(name, index)
            assert other.text(name, index) == one.text(name, index)
            assert other.last(name, index).finish_reason == one.last(name, index).finish_reason
            assert other.last(name, index).stop_reason == one.last(name, index).stop_reason
            ours, theirs = ([n for e in w.events[name] if e.index == index for n in _numbers(e)] for w in (one, other))
            assert ours == pytest.approx(theirs, abs=1e-5)

    def check_greedy(self, delta: str | None, prompt: list[int], bias: dict[int, float], tokens: list[int]) -> None:
        context = list(prompt)
        for token in tokens:
            assert token == (7 if bias else next_token(salt_of(delta), context)), "another variant's token"
            context.append(token)


def _numbers(event: TokenEvent) -> list[float]:
    """Of all log-probabilities that an event reports. Which of equally likely tokens are named is nobody's business."""
    positions = [p for p in (*event.logprobs, *(event.prompt_logprobs or ())) if p is not None]
    chosen = [n for p in positions for n in (p.chosen.token_id, p.chosen.logprob, p.chosen.rank)]
    return [*chosen, *(t.logprob for p in positions for t in p.top)]


TestOverlap = Overlap.TestCase
TestOverlap.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
