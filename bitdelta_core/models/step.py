"""What all layers of one step share, worked out once: rope, attention plans, each row's vectors and deltas."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bitdelta_core.models.batch import Batch
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.parameters import Span
from bitdelta_core.models.rope import cos_sin
from kernels.deltas import Placed
from kernels.paged_attention import AttentionPlan
from kernels.rotary import signed_sin
from kernels.segments import BASE, Segment, check_segments

Deltas = Mapping[str, Mapping[int, Sequence[Placed]]]


class Vectors:
    """The 1-D parameters of every row: one block for all, or U blocks and which one each row takes."""

    def __init__(self, blocks_UV: torch.Tensor, block_of_row_T: torch.Tensor | None) -> None:
        self._blocks_UV = blocks_UV
        self._block_of_row_T = block_of_row_T

    def get(self, span: Span) -> torch.Tensor:
        """[D] when all rows share it, else [T, D]."""
        part_UD = self._blocks_UV[:, span.start : span.stop]
        return part_UD[0] if self._block_of_row_T is None else part_UD.index_select(0, self._block_of_row_T)

    def rows(self, index_L: torch.Tensor) -> Vectors:
        """Of some of the rows."""
        if self._block_of_row_T is None:
            return self
        return Vectors(self._blocks_UV, self._block_of_row_T.index_select(0, index_L))


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that a layer needs beside its weights and its input."""

    batch: Batch
    vectors: Vectors
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    attention: Mapping[int | None, AttentionPlan]
    """By window."""
    deltas: Deltas
    """Target -> slot -> its deltas."""

    @classmethod
    def of(cls, batch: Batch, config: ModelConfig, base_vectors_V: torch.Tensor, block_size: int) -> Step:
        check_segments(batch.segments, batch.rows)
        check_segments(batch.logit_segments, batch.logit_rows_L.shape[0])
        cos, sin = _rope(batch, config)
        return cls(
            batch=batch,
            vectors=_vectors(batch, base_vectors_V),
            cos_TD=cos.to(base_vectors_V.dtype),
            sin_TD=signed_sin(sin).to(base_vectors_V.dtype),
            attention={
                window: AttentionPlan.build(
                    batch.query_starts, batch.context_lens, batch.block_tables_SM, block_size, window
                )
                for window in set(config.windows)
            },
            deltas=_deltas(batch),
        )

    def deltas_of(self, target: str) -> Mapping[int, Sequence[Placed]]:
        return self.deltas.get(target, {})


def _rope(batch: Batch, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    used = [config.rope if s.slot == BASE else batch.variants[s.slot].config.rope for s in batch.segments]
    distinct = list(dict.fromkeys(used))
    owner = _owner_of_rows(batch.segments, [distinct.index(r) for r in used], batch.positions_T.device)
    return cos_sin(tuple(distinct), owner if len(distinct) > 1 else None, batch.positions_T)


def _vectors(batch: Batch, base_V: torch.Tensor) -> Vectors:
    blocks, owner = [base_V], []
    for segment in batch.segments:
        own_V = None if segment.slot == BASE else batch.variants[segment.slot].vectors
        owner.append(0 if own_V is None else len(blocks))
        if own_V is not None:
            blocks.append(own_V)
    used = sorted(set(owner))
    if len(used) == 1:
        return Vectors(blocks[used[0]][None], None)
    return Vectors(torch.stack(blocks), _owner_of_rows(batch.segments, owner, base_V.device))


def _owner_of_rows(segments: Sequence[Segment], owner: Sequence[int], device: torch.device) -> torch.Tensor:
    """owner[i] for every row of segment i: int64 [T]."""
    rows = [o for segment, o in zip(segments, owner, strict=True) for _ in range(segment.rows)]
    return torch.tensor(rows, device=device)


def _deltas(batch: Batch) -> Deltas:
    by_target: dict[str, dict[int, Sequence[Placed]]] = defaultdict(dict)
    for segment in batch.segments:
        if segment.slot != BASE:
            for target, placed in batch.variants[segment.slot].linears.items():
                by_target[target][segment.slot] = placed
    return by_target
