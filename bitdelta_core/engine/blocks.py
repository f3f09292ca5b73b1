"""Paged KV cache: which sequence owns which block, and which blocks can be reused because their content is known.

A block holds the K and V of `block_size` consecutive tokens of all layers. Only full blocks are ever shared, so no
block that somebody else reads is written to. A block is in exactly one of three conditions:

    blank    free, content meaningless
    cached   free, content known and findable: reused least recently used first, when no blank block is left
    owned    in the block tables of one or more sequences (its reference count); its content may be known as well

The content of a block is known under a key that chains over all tokens before it and starts from the variant's sha256:
what one variant computed is never found by another, whatever it is called.

Plan with a `Draft` (it changes nothing), then `commit` (it cannot fail).
Not covered: copy-on-write of half-filled blocks, offloading to the host.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def root_key(delta: str | None) -> bytes:
    """Where a variant's chain starts: a hash of its delta's sha256 (the base: of nothing)."""
    return hashlib.sha256((delta or "").encode()).digest()


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block that holds `tokens` after all that `parent` stands for."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


@dataclass(frozen=True, slots=True)
class Claim:
    """What one sequence asks for: known blocks to share, in order, then fresh ones."""

    hits: tuple[int, ...] = ()
    fresh: int = 0


@dataclass(frozen=True, slots=True)
class Content:
    """What a block is known to hold."""

    key: bytes
    tokens: tuple[int, ...]


class BlockManager:
    """Blocks 1..num_blocks-1; block 0 is reserved for padding and never given to a sequence."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        assert num_blocks >= 2, "one block is reserved, so at least two are needed"
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._content: dict[int, Content] = {}
        self._found: dict[bytes, int] = {}

    @property
    def total(self) -> int:
        """Blocks that sequences can own."""
        return self.num_blocks - 1

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.free

    def refs(self, block: int) -> int:
        return self._refs[block]

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def match(self, delta: str | None, tokens: Sequence[int]) -> tuple[tuple[int, ...], bytes]:
        """The longest run of known full blocks that `tokens` begins with, and the key of its last one.

        At least one token is left over, because somebody has to compute the logits after the last one.
        """
        key, hits = root_key(delta), []
        if not self.prefix_caching:
            return (), key
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            part = tuple(tokens[start : start + self.block_size])
            child = chain_key(key, part)
            block = self._found.get(child)
            if block is None or self._content[block].tokens != part:
                break
            hits.append(block)
            key = child
        return tuple(hits), key

    def draft(self) -> Draft:
        return Draft(self)

    def commit(self, claims: Sequence[Claim], released: Sequence[Sequence[int]] = ()) -> list[list[int]]:
        """Take the `released` tables back and give every claim its blocks, in order: what a Draft has agreed to.

        Sharing comes first and fresh blocks last, so that no block that a claim shares is overwritten for another.
        """
        for claim in claims:
            for block in claim.hits:
                self._share(block)
        for table in released:
            self.release(table)
        return [[*claim.hits, *(self._take() for _ in range(claim.fresh))] for claim in claims]

    def release(self, table: Iterable[int]) -> None:
        """A sequence gives its blocks back. The end of a prefix is forgotten before its beginning."""
        for block in reversed(list(table)):
            assert self._refs[block] > 0, f"block {block} released without being owned"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._retire(block)

    def publish(self, block: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """The owned `block` now holds `tokens` after `parent`. Returns its key."""
        assert self._refs[block] > 0, f"block {block} published without being owned"
        assert len(tokens) == self.block_size, "only full blocks are published"
        key = chain_key(parent, tokens)
        if self.prefix_caching and key not in self._found and block not in self._content:
            self._found[key] = block
            self._content[block] = Content(key, tuple(tokens))
        return key

    def _share(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._found[self._content.pop(block).key]
        self._refs[block] = 1
        return block

    def _retire(self, block: int) -> None:
        if block in self._content:
            self._cached[block] = None
        else:
            self._blank.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert every invariant; with all sequences' tables, also that the reference counts are theirs."""
        owned = {block for block in range(self.num_blocks) if self._refs[block] > 0}
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert 0 not in owned | blank | cached, "block 0 was given away"
        assert sorted([*owned, *blank, *cached]) == list(range(1, self.num_blocks)), (
            "a block is lost or in two conditions"
        )
        assert cached <= set(self._content), "a cached block's content is unknown"
        assert not blank & set(self._content), "a blank block's content is known"
        assert {c.key: b for b, c in self._content.items()} == self._found, "index and contents differ"
        if tables is not None:
            counts = Counter(block for table in tables for block in table)
            assert all(self._refs[b] == counts[b] for b in range(self.num_blocks)), (
                "reference counts are not the tables'"
            )


class Draft:
    """What-if bookkeeping over a BlockManager: takes and releases that have not happened."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._change: Counter[int] = Counter()
        self.free = blocks.free

    def _refs(self, block: int) -> int:
        return self._blocks.refs(block) + self._change[block]

    def take(self, claim: Claim) -> bool:
        """Reserve, or return False and change nothing."""
        need = claim.fresh + sum(self._refs(block) == 0 for block in claim.hits)
        if need > self.free:
            return False
        self.free -= need
        self._change.update(claim.hits)
        return True

    def untake(self, claim: Claim) -> None:
        """Undo a take of this draft."""
        self.free += claim.fresh
        self.release(claim.hits)

    def release(self, table: Iterable[int]) -> None:
        for block in table:
            self._change[block] -= 1
            self.free += self._refs(block) == 0
