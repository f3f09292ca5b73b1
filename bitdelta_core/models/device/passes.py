"""One forward pass: its rows and buffers, and the two ops that decode-sized and wide steps compute differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bitdelta_core.models.device.activations import Activations
from bitdelta_core.models.device.kinds import StepKinds
from kernels.delta_linear.device import delta_linear
from kernels.delta_linear.wide import prefill_linear
from kernels.device import DeviceDeltas, Planes, StepRows, Target
from kernels.paged_attention import device as attention
from kernels.rotary.device import Turn, rope_and_cache

Segments = Sequence[tuple[int, int, int]]
"""(entry, start, stop)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class WideStep:
    """Chunks of prompts: what the host knows of them beside the device's rows."""

    rows: StepRows
    """`segments_G4` is not read."""
    segments: Segments
    """Of all rows, the base's too, in order"""
    tiles_I4: torch.Tensor
    """`row_tiles.row_tiles(segments)`, on the device"""
    max_query: int
    """Most rows of one sequence"""


class Pass(Protocol):
    """A step under way."""

    @property
    def rows(self) -> StepRows: ...

    @property
    def buffers(self) -> Activations: ...

    @property
    def deltas(self) -> DeviceDeltas: ...

    @property
    def kinds(self) -> StepKinds: ...

    def linear(self, op: str, x_TK: torch.Tensor, weight_NK: torch.Tensor, target: Target) -> None:
        """From x, and its planes where it has some, to the op's partials."""
        ...

    def attend(self, turn: Turn, cache_B2GSD: torch.Tensor, window: int | None, target: Target) -> None:
        """From what the linear left of q, k and v, and the cache, which k and v go to, to `attended_TC`, and its planes
        for `target` where that takes some."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePass:
    """One row of each sequence."""

    rows: StepRows
    buffers: Activations
    deltas: DeviceDeltas
    kinds: StepKinds
    workspace: attention.Workspace

    def linear(self, op: str, x_TK: torch.Tensor, weight_NK: torch.Tensor, target: Target) -> None:
        linear, rows = self.buffers.linears[op], self.rows
        delta_linear(
            x_TK,
            linear.planes,
            weight_NK,
            target,
            self.deltas,
            rows.segments_G4,
            self.kinds.layers,
            linear.out,
            self.buffers.scratch,
        )

    def attend(self, turn: Turn, cache_B2GSD: torch.Tensor, window: int | None, target: Target) -> None:
        rows, buffers = self.rows, self.buffers
        planes: Planes | None = buffers.linears["o"].planes
        attention.decode(
            buffers.q_THD,
            cache_B2GSD,
            rows.block_tables_SM,
            rows.context_lens_S,
            window,
            buffers.attended_TC,
            planes,
            None if planes is None else target,
            self.deltas,
            rows.entry_T,
            self.kinds.layers,
            self.workspace,
            turn=turn,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WidePass:
    """Chunks of prompts."""

    step: WideStep
    buffers: Activations
    deltas: DeviceDeltas
    kinds: StepKinds
    workspace: attention.Workspace

    @property
    def rows(self) -> StepRows:
        return self.step.rows

    def linear(self, op: str, x_TK: torch.Tensor, weight_NK: torch.Tensor, target: Target) -> None:
        prefill_linear(
            x_TK,
            weight_NK,
            target,
            self.deltas,
            self.step.tiles_I4,
            self.step.segments,
            self.kinds.layers,
            self.buffers.linears[op].out.base_STN[0],
            self.buffers.scratch,
        )

    def attend(self, turn: Turn, cache_B2GSD: torch.Tensor, window: int | None, target: Target) -> None:
        rows, buffers = self.rows, self.buffers
        rope_and_cache(turn, self.deltas, rows.entry_T, buffers.q_THD, cache_B2GSD)
        attention.prefill(
            buffers.q_THD,
            cache_B2GSD,
            rows.query_starts_S1,
            rows.context_lens_S,
            rows.block_tables_SM,
            window,
            buffers.attended_TC,
            self.step.max_query,
            workspace=self.workspace,
        )
