"""What passes between the launches of one step: buffers for one number of rows, carved out of the shared memory.

Buffers that are not alive together share bytes: those of a layer are every layer's, and the head's lie over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.arena import WorkArena
from bitdelta_core.models.device.kinds import StepKinds
from kernels.delta_linear import wide
from kernels.delta_linear.choice import choose
from kernels.delta_linear.device import has_deltas
from kernels.device import Kinds, Partials, Planes, Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What sizes depend on beside the rows."""

    config: ModelConfig
    targets: Mapping[str, Target]
    vocab: int
    """Columns of logits"""
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearBuffers:
    """What goes into one linear and comes out."""

    planes: Planes | None
    """Of its input; None: it takes none"""
    out: Partials


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """T rows, L of which have logits. In wide steps, linears take no planes and their products are complete, in the
    compute dtype; but not the head's."""

    residuals_TK: tuple[torch.Tensor, torch.Tensor]
    """float32. One is read while the other is written."""
    hidden_TK: torch.Tensor
    cos_TH: torch.Tensor
    sin_TH: torch.Tensor
    q_THD: torch.Tensor
    attended_TC: torch.Tensor
    inner_TI: torch.Tensor
    linears: Mapping[str, LinearBuffers]
    """By op: qkv, o, gate_up, down, head"""
    scratch: torch.Tensor
    """uint8, for linears"""
    head_hidden_LK: torch.Tensor
    logits_LV: torch.Tensor
    """float32"""

    @classmethod
    def take(
        cls, arena: WorkArena, shapes: Shapes, rows: int, logits: int, kinds: StepKinds, *, wide_step: bool
    ) -> Activations:
        """Args:
        wide_step: many rows of each segment.
        """
        c, dtype, head = shapes.config, shapes.dtype, shapes.targets["head"]

        def linear(op: str) -> LinearBuffers:
            target = shapes.targets[f"0.{op}"]
            if wide_step:
                whole_1TN = arena.take((1, rows, target.outputs), dtype)
                return LinearBuffers(planes=None, out=Partials(whole_1TN, None))
            planes = _take_planes(arena, shapes, target, rows, kinds.layers)
            return LinearBuffers(planes=planes, out=_take_partials(arena, shapes, target, rows, kinds.layers))

        residuals = tuple(arena.take((rows, c.hidden_size), torch.float32) for _ in range(2))
        scratch = arena.take((_scratch_bytes(shapes, rows, logits, kinds, wide_step),), torch.uint8)
        down, head_hidden = linear("down"), arena.take((logits, c.hidden_size), dtype)
        head_planes = _take_planes(arena, shapes, head, logits, kinds.head)
        with arena.reused():
            taken = {
                "hidden_TK": arena.take((rows, c.hidden_size), dtype),
                "cos_TH": arena.take((rows, c.head_dim // 2), torch.float32),
                "sin_TH": arena.take((rows, c.head_dim // 2), torch.float32),
                "q_THD": arena.take((rows, c.num_heads, c.head_dim), dtype),
                "attended_TC": arena.take((rows, c.num_heads * c.head_dim), dtype),
                "inner_TI": arena.take((rows, c.intermediate_size), dtype),
            }
            linears = {op: linear(op) for op in ("qkv", "o", "gate_up")}
        head_out = _take_partials(arena, shapes, head, logits, kinds.head, shapes.vocab)
        return cls(
            residuals_TK=(residuals[0], residuals[1]),
            linears={**linears, "down": down, "head": LinearBuffers(planes=head_planes, out=head_out)},
            scratch=scratch,
            head_hidden_LK=head_hidden,
            logits_LV=arena.take((logits, shapes.vocab), torch.float32),
            **taken,
        )


def _take_planes(arena: WorkArena, shapes: Shapes, target: Target, rows: int, kinds: Kinds) -> Planes | None:
    if not kinds.signs or choose(target, rows, kinds, shapes.device).impl == "unpack":
        return None
    sets, words = kinds.sets(target), target.tiles[1] * 128
    return Planes(
        arena.take((sets, rows, words), torch.int32),
        arena.take((sets, rows), torch.float32),
        arena.take((sets, rows), torch.int32),
    )


def _take_partials(
    arena: WorkArena, shapes: Shapes, target: Target, rows: int, kinds: Kinds, width: int | None = None
) -> Partials:
    config, width = choose(target, rows, kinds, shapes.device), width or target.outputs
    base_STN = arena.take((config.split(target, width, shapes.device), rows, width), config.base_dtype(shapes.dtype))
    return Partials(base_STN, arena.take((rows, width), torch.float32) if has_deltas(kinds) else None)


def _scratch_bytes(shapes: Shapes, rows: int, logits: int, kinds: StepKinds, wide_step: bool) -> int:
    """Narrow linears need some for low-rank parts alone."""
    needs = [0]
    if wide_step or kinds.layers.low_rank:
        layer = (shapes.targets[f"0.{op}"] for op in ("qkv", "o", "gate_up", "down"))
        needs += [wide.workspace_bytes(target, rows, kinds.layers, shapes.dtype) for target in layer]
    if kinds.head.low_rank:
        needs.append(wide.workspace_bytes(shapes.targets["head"], logits, kinds.head, shapes.dtype))
    return max(needs)
