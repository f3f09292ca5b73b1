"""Which rows attend to which cache slots: worked out once per step, used by every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SHORT = 256
"""Contexts up to this share one padded call; longer ones go with those of the same power of two."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """S sequences with one row each, contexts padded to L. Padding repeats a slot of the same sequence."""

    rows_S: torch.Tensor | None
    """int64; None: the batch's rows are these, in order"""
    slots_SL: torch.Tensor
    visible_S11L: torch.Tensor | None
    """bool; None: nothing is padded"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence with R rows, of which row i sees the context up to its own position."""

    start: int
    stop: int
    slots_L: torch.Tensor
    visible_RL: torch.Tensor | None
    """bool; None: plain causal, nothing precedes the chunk"""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step, one window."""

    decode: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]

    @classmethod
    def build(
        cls,
        query_starts: Sequence[int],
        context_lens: Sequence[int],
        block_tables_SM: torch.Tensor,
        block_size: int,
        window: int | None,
    ) -> AttentionPlan:
        """Sequence s owns rows query_starts[s]:query_starts[s+1], the last of its context_lens[s] tokens.

        `window`: how many positions a row sees, itself included; None: all.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        chunks = []
        for s, context in enumerate(context_lens):
            start, stop = query_starts[s], query_starts[s + 1]
            assert 0 < stop - start <= context, f"sequence {s} has {stop - start} rows in a context of {context}"
            if stop - start == 1:
                seen = context if window is None else min(window, context)
                groups[max(SHORT, 1 << (seen - 1).bit_length())].append(s)
            else:
                chunks.append(_chunk(start, stop, context, block_tables_SM[s], block_size, window))
        alone = len(groups) == 1 and not chunks
        decode = tuple(
            _group(members, query_starts, context_lens, block_tables_SM, block_size, window, alone)
            for members in groups.values()
        )
        return cls(decode, tuple(chunks))


def _group(
    members: list[int],
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    block_tables_SM: torch.Tensor,
    block_size: int,
    window: int | None,
    alone: bool,
) -> DecodeGroup:
    device = block_tables_SM.device
    contexts = [context_lens[s] for s in members]
    seen = [c if window is None else min(window, c) for c in contexts]
    length = max(seen)
    last_S1 = torch.tensor(contexts, device=device)[:, None] - 1
    first_S1 = last_S1 + 1 - torch.tensor(seen, device=device)[:, None]
    positions_SL = torch.minimum(first_S1 + torch.arange(length, device=device), last_S1)
    tables = block_tables_SM if alone else block_tables_SM[torch.tensor(members, device=device)]
    slots_SL = tables.gather(1, positions_SL // block_size).long() * block_size + positions_SL % block_size
    visible = None
    if min(seen) < length:
        visible = (torch.arange(length, device=device) < torch.tensor(seen, device=device)[:, None])[:, None, None]
    rows = None if alone else torch.tensor([query_starts[s] for s in members], device=device)
    return DecodeGroup(rows, slots_SL, visible)


def _chunk(
    start: int, stop: int, context: int, block_table_M: torch.Tensor, block_size: int, window: int | None
) -> Chunk:
    device, rows = block_table_M.device, stop - start
    first = 0 if window is None else max(context - rows - window + 1, 0)
    keys_L = torch.arange(first, context, device=device)
    slots_L = block_table_M[keys_L // block_size].long() * block_size + keys_L % block_size
    if rows == context and (window is None or window >= context):
        return Chunk(start, stop, slots_L, None)
    queries_R1 = torch.arange(context - rows, context, device=device)[:, None]
    visible = keys_L <= queries_R1
    if window is not None:
        visible &= keys_L > queries_R1 - window
    return Chunk(start, stop, slots_L, visible)
