"""The block manager against a model that remembers what was written to every block."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bitdelta_core.engine.blocks import BlockManager, Claim, root_key

SIZE = 2
DELTAS = (None, "aa" * 32, "bb" * 32)


class Blocks(RuleBasedStateMachine):
    """Sequences of a tiny alphabet, so that prefixes coincide often, within a variant and across variants."""

    @initialize(num_blocks=st.integers(2, 12), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.blocks = BlockManager(num_blocks, SIZE, prefix_caching=caching)
        self.tables: list[tuple[str | None, list[int], list[int]]] = []
        self.written: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    @rule(delta=st.sampled_from(DELTAS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def open(self, delta: str | None, tokens: list[int]) -> None:
        hits, _ = self.blocks.match(delta, tokens)
        for i, block in enumerate(hits):
            assert self.written[block] == (delta, tuple(tokens[: (i + 1) * SIZE])), "another prefix's block was found"
        assert len(hits) * SIZE < len(tokens), "nothing is left to compute"
        claim = Claim(hits, self.blocks.blocks_for(len(tokens)) - len(hits))
        free = self.blocks.free
        if not self.blocks.draft().take(claim):
            assert claim.fresh + sum(not self.blocks.refs(b) for b in hits) > free
            return
        [table] = self.blocks.commit([claim])
        assert len(table) == self.blocks.blocks_for(len(tokens))
        for block in table[len(hits) :]:
            self.written.pop(block, None)
        key = root_key(delta)
        for i in range(len(tokens) // SIZE):
            if i >= len(hits):
                self.written[table[i]] = (delta, tuple(tokens[: (i + 1) * SIZE]))
            key = self.blocks.publish(table[i], key, tokens[i * SIZE : (i + 1) * SIZE])
        self.tables.append((delta, tokens, table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        _, _, table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.release(table)

    @precondition(lambda self: self.tables and self.blocks.prefix_caching)
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        """What an open sequence has published is found, in full."""
        delta, tokens, _ = self.tables[data.draw(st.integers(0, len(self.tables) - 1))]
        hits, _ = self.blocks.match(delta, tokens)
        assert len(hits) == (len(tokens) - 1) // SIZE

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.check_integrity(table for _, _, table in self.tables)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
