"""Settings of the low-rank kernels, and the workspace that holds for any of them."""

# Triton's types are not Python's:
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from kernels.delta_linear import triton_parts as parts
from kernels.device import SEGMENT_ROWS, Target

MANY_ROWS = 256
BYTE_ROWS = 1024
"""Rows of prefill whose x A^T is in the workspace at once, where factors are bytes"""
SPLIT_FLOATS = 2**18
"""K is not split where the partial sums of byte factors would take more: 1 MiB"""
_EXPAND_FLOATS = 2**14
"""Of x A^T, that a program of expand has in shared memory: 64 KiB, which every chip has"""
_PROGRAMS = 512
"""Of byte factors, up to which K is split: expand reads what every split has left, and splits for more were slower"""
_FULL, _FEW = 1024, 64
"""Programs of expand, from which they are made larger, and up to which smaller"""
_AT_ONCE = 256
"""Programs of shrink that a large GPU runs at the same time: up to so many, each has one block of ranks"""
_MOST_PROGRAMS = 8192
"""Of one launch of shrink: those of short ranks end at once, but not for nothing"""


@dataclass(frozen=True, slots=True)
class LowRankConfig:
    split: int
    """Parts that K is cut into: a power of two"""
    rows: int = 16
    """Rows of x that are multiplied at once"""
    rank_block: int = 32
    inner: int = 128
    """Inputs that are loaded at once"""
    stages: int = 4
    blocks: int = 8
    """Programs for the rank blocks of one segment and split; more where segments are few: `shrink_blocks`"""
    strips: int = 1
    """Programs for the row blocks of one segment, split and rank block"""
    outputs: int = 64
    """Of one program of expand"""
    warps: int = 4
    ranks: int = 32
    """Of a member, that expand multiplies at once"""


def key(target: Target, rows: int, max_rank: int) -> str:
    """What measured configurations are filed under."""
    return f"low rank {target.outputs}x{target.inputs} {triton.next_power_of_2(rows)} {max_rank}"


def choose(target: Target, rows: int, max_rank: int, device: torch.device) -> LowRankConfig:
    """What was measured on this device, else the rule: splits so that a few segments of rank 16 already fill a GPU,
    with programs of 8 KiB or more."""
    found = parts.measured(key(target, rows, max_rank), device)
    if found is not None:
        return LowRankConfig(**found)
    width = len(target.members) * max_rank
    return LowRankConfig(
        split=most_splits(target, rows, max_rank),
        rows=(16 if rows <= 32 else 32) if rows <= MANY_ROWS else 64,
        rank_block=16 if width <= 48 else 32,
        strips=1 if rows <= 64 else 2 if rows <= 128 else 4,
        outputs=64 if rows < 8 or max_rank > 64 else 256 if max_rank == 16 else 128,
        warps=2 if width <= 48 else 4,
    )


def candidates(target: Target, rows: int, max_rank: int) -> list[LowRankConfig]:
    """For a benchmark's sweep."""
    most = most_splits(target, rows, max_rank)
    tall = (16, 32) if rows > 16 else (16,)
    return [
        LowRankConfig(split, x_rows, block, inner, stages, 8, strips, outputs, warps)
        for split in (1, 2, 4, 8, 16)
        if split <= most
        for x_rows in tall
        for block, warps in ((16, 1), (16, 2), (32, 4))
        for inner, stages in ((128, 4), (256, 3))
        for strips in ((1,) if rows <= 64 else (1, 2, 4))
        for outputs in (64, 128, 256)
    ]


def most_splits(target: Target, rows: int, max_rank: int) -> int:
    """No configuration has more: the workspace is made for it. Many rows or ranks fill a GPU with fewer."""
    width = len(target.members) * max_rank
    most = 16 if width <= 32 else 8 if width <= 128 else 4 if width <= 512 else 2
    if rows > MANY_ROWS:
        most //= 2
    return _power_of_two(min(most, target.inputs // 256))


def byte_key(target: Target, segments: int, rank: int, longest: int) -> str:
    """What measured configurations of byte factors are filed under."""
    size, rows = triton.next_power_of_2(segments), triton.next_power_of_2(longest)
    return f"byte factors {target.outputs}x{target.inputs} {size} {rank} {rows}"


def choose_bytes(
    target: Target, rows: int, segments: int, rank: int, device: torch.device, *, longest: int = SEGMENT_ROWS
) -> LowRankConfig:
    """For steps with byte factors, whatever else they have: what was measured on this device, else the rule.

    Args:
        rank: the highest of any factors. longest: rows of the longest segment.
    """
    found = parts.measured(byte_key(target, segments, rank, longest), device)
    return byte_rule(target, rows, segments, rank, longest) if found is None else LowRankConfig(**found)


def byte_rule(target: Target, rows: int, segments: int, rank: int, longest: int) -> LowRankConfig:
    """Of few rows a program has 32 of A: measured, 64 take up to a quarter longer. K is split where the rows of A alone
    do not fill a GPU."""
    width, at_once = len(target.members) * rank, max(8, min(64, triton.next_power_of_2(longest)))
    block, strips = 32 if at_once == 8 else 64, min(4, triton.cdiv(longest, at_once))
    blocks = min(triton.cdiv(width, block), max(1, _MOST_PROGRAMS // (segments * strips)))
    split = byte_splits(target, rows, width, blocks * segments * strips)
    return LowRankConfig(
        split,
        at_once,
        rank_block=block,
        stages=4 if at_once == 8 else 3,
        blocks=blocks,
        strips=strips,
        outputs=byte_outputs(target, segments) if at_once == 8 else 64,
        warps=block // 16,
        ranks=128 if at_once == 8 and split <= 2 else 64,
    )


def shrink_blocks(config: LowRankConfig, width: int, segments: int) -> int:
    """Programs for the `width` rows of A of one segment and split."""
    room = _AT_ONCE // max(1, segments * config.split * config.strips)
    return min(triton.cdiv(width, config.rank_block), max(config.blocks, room))


def expanded_ranks(config: LowRankConfig, rank: int, buffers: int) -> int:
    """Of a member, that expand multiplies at once: of x A^T in all its parts so many are in shared memory, `buffers`
    times."""
    room = _EXPAND_FLOATS // (buffers * config.split * config.rows)
    return min(config.ranks, triton.next_power_of_2(rank), max(16, room))


def byte_outputs(target: Target, segments: int) -> int:
    """Of a program of expand, which reads all of a segment's x A^T: so as many as leave enough programs."""
    if triton.cdiv(target.outputs, 128) * segments >= _FULL:
        return 128
    return 32 if triton.cdiv(target.outputs, 64) * segments <= _FEW else 64


def byte_candidates(target: Target, rows: int, segments: int, rank: int) -> list[LowRankConfig]:
    """For a benchmark's sweep over decode steps: the rule's choice, and what differs from it in one thing."""
    chosen = byte_rule(target, rows, segments, rank, SEGMENT_ROWS)
    found = [chosen]
    if chosen.split > 1:
        found.append(replace(chosen, split=chosen.split // 2))
    twice = 2 * chosen.split
    if twice <= most_byte_splits(target) and twice * rows * len(target.members) * rank <= SPLIT_FLOATS:
        found.append(replace(chosen, split=twice))
    found += [replace(chosen, inner=inner, stages=stages) for inner, stages in ((64, 6), (256, 3), (128, 6))]
    found += [replace(chosen, outputs=outputs) for outputs in (32, 64, 128, 256)]
    larger = replace(chosen, rank_block=64, blocks=triton.cdiv(chosen.blocks, 2), warps=4)
    return list(dict.fromkeys([*found, larger, replace(chosen, ranks=64)]))


def byte_splits(target: Target, rows: int, width: int, programs: int) -> int:
    """A power of two. `programs`: that there are without splitting."""
    room = SPLIT_FLOATS // max(1, rows * width)
    return _power_of_two(min(most_byte_splits(target), _PROGRAMS // programs, room))


def most_byte_splits(target: Target) -> int:
    return _power_of_two(min(8, target.inputs // 256))


def _power_of_two(most: int) -> int:
    """The largest up to `most`, at least 1."""
    return 2 ** (max(1, most).bit_length() - 1)


def byte_rank(target: Target, highest: int) -> int:
    """Of a target, where `highest` is that of any: no byte factor has more than its matrix has rows or columns."""
    return min(highest, triton.cdiv(min(target.outputs, target.inputs), 16) * 16)


def workspace_floats(target: Target, rows: int, max_rank: int, highest_bytes: int = 0) -> int:
    """float32 elements that x A^T of a step takes. More rows, or higher ranks of bytes, never take less."""
    members, words = len(target.members), 0
    if max_rank:
        words = most_splits(target, rows, max_rank) * rows * members * max_rank
    if not highest_bytes:
        return words
    rank = max(max_rank, byte_rank(target, highest_bytes))
    once = min(rows, BYTE_ROWS) * members * rank
    return max(words, once, min(SPLIT_FLOATS, most_byte_splits(target) * once))
