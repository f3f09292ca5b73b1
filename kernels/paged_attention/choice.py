"""Settings of the attention launches: measured ones where there are any, else a rule. Only their speed differs, and in
`decode` the order of sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
import triton

from kernels import configs

MOST_SPLITS = 64
"""Of one context."""
_SPLIT_ROWS = 1024
"""Rows times splits, where rows are many: bounds the workspace."""
_SHORT = 512
"""Rows of a chunk, times heads of a group, of which smaller tiles are made: more programs"""
_CONTEXT = 1024
"""What the rule takes for a usual context."""
_DIRECT = ((2, 4, 2, 0, 4), (2, 4, 1, 0, 2), (1, 4, 1, 128, 4), (2, 8, 1, 128, 2), (2, 8, 2, 0, 2), (4, 4, 2, 0, 2))
_IN_TURN = ((1, 4, 3, 128), (1, 4, 4, 128), (2, 8, 3, 0), (1, 4, 1, 128))
"""What is worth a search: tiles of so many times 8 KiB of keys in 16 bits, warps, stages, registers; and programs that
then fit on a multiprocessor"""


@dataclass(frozen=True, slots=True)
class Chip:
    multiprocessors: int
    shared_bytes: int
    """What one program may have"""
    hopper: bool
    """Has products of 64 rows that read shared memory"""

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, device: torch.device) -> Chip:
        if device.type != "cuda":
            return cls(4, 160 * 1024, True)  # few enough that each of the interpreter's programs takes several units
        found = torch.cuda.get_device_properties(device)
        return cls(found.multi_processor_count, found.shared_memory_per_block_optin, found.major == 9)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    tile: int
    """Tokens of one matrix product"""
    chunk: int
    """Tokens of one unit of work, until a context has `splits` of them; then units grow"""
    splits: int
    """Most units of one context and head"""
    programs: int
    """How many there are, whatever the contexts"""
    warps: int
    stages: int
    """Triton's: one more than there are tiles in shared memory. 1: the next tile is in registers, the first one from
    before the kernel before has ended, if `turn`"""
    direct: bool = False
    """A program for every one of `splits` of every row and head: for few rows, whose unused splits cost little"""
    turn: bool = False
    """Rotary embedding is attention's own, not a launch before it"""
    registers: int = 0
    """Most of a thread, so that more programs fit on a multiprocessor; 0: as many as the compiler likes"""


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    rows: int
    """Of a tile: positions times heads of a group"""
    tile: int
    """Tokens"""
    warps: int
    stages: int


def choose_decode(rows: int, kv_heads: int, group: int, head_dim: int, device: torch.device) -> DecodeConfig:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = configs.nearest("paged_attention", name, rows, lambda n: decode_key(n, kv_heads, group, head_dim))
        if found is not None:
            return _for_rows(DecodeConfig(**found[1]), found[0], rows)
    return decode_rule(rows, kv_heads, group, head_dim, Chip.of(device))


def _for_rows(config: DecodeConfig, measured: int, rows: int) -> DecodeConfig:
    """Settings measured with other rows: shorter units for fewer rows, so that programs still have work; the splits
    are those that the workspace is made for, or the grid."""
    if config.direct:
        return config
    share = min(1.0, triton.next_power_of_2(rows) / measured)
    return replace(config, chunk=max(config.tile, int(config.chunk * share)), splits=splits_of(rows))


def choose_prefill(max_query: int, group: int, head_dim: int, device: torch.device) -> PrefillConfig:
    if device.type == "cuda":
        key = prefill_key(max_query, group, head_dim)
        if (found := configs.lookup("paged_attention", torch.cuda.get_device_name(device), key)) is not None:
            return PrefillConfig(**found)
    return prefill_rule(max_query, group, head_dim, Chip.of(device))


def decode_key(rows: int, kv_heads: int, group: int, head_dim: int) -> str:
    """What measured settings are filed under: heads, and rows up to a power of two."""
    return f"decode {kv_heads}x{group}x{head_dim} {triton.next_power_of_2(rows)}"


def prefill_key(max_query: int, group: int, head_dim: int) -> str:
    """By heads, and whether there are several tiles of 128 rows."""
    return f"prefill {group}x{head_dim} {'long' if max_query * group > _SHORT else 'short'}"


def decode_rule(rows: int, kv_heads: int, group: int, head_dim: int, chip: Chip) -> DecodeConfig:
    """Tiles of 16 KiB of keys in 16 bits, two of them in shared memory, and as many programs as then fit.

    Units of such a length that usual contexts occupy every program: at least a tile, at most 512 tokens, or 1024 for
    wide groups, whose sums are more to write and to add up. Where rows and heads are fewer than multiprocessors, units
    have a program each, about four a multiprocessor.
    """
    tile, warps, stages = min(128, 8192 // triton.next_power_of_2(head_dim)), 4, 3
    programs = chip.multiprocessors * max(1, _resident(chip, tile, head_dim, stages))
    if rows * kv_heads <= chip.multiprocessors:
        chunk, splits = _direct_units(rows, kv_heads, tile, 4, chip)
        return DecodeConfig(tile, chunk, splits, 0, warps, 2, direct=True, turn=True)
    chunk = triton.next_power_of_2(triton.cdiv(rows * kv_heads * _CONTEXT, programs))
    longest = 512 if group <= 4 else 1024
    return DecodeConfig(tile, min(max(chunk, tile), longest), splits_of(rows), programs, warps, stages, turn=True)


def decode_candidates(rows: int, kv_heads: int, group: int, head_dim: int, chip: Chip) -> list[DecodeConfig]:
    """What a benchmark should try and a compiler tell apart, the rule's choice first."""
    rule = decode_rule(rows, kv_heads, group, head_dim, chip)
    least, programs = 4096 // triton.next_power_of_2(head_dim), chip.multiprocessors * 4
    found = [rule]
    if rows * kv_heads <= 4 * chip.multiprocessors:
        for n, warps, stages, most, each in _DIRECT:
            chunk, splits = _direct_units(rows, kv_heads, n * least, each, chip)
            found.append(DecodeConfig(n * least, chunk, splits, 0, warps, stages, True, True, most))
    usual = triton.next_power_of_2(_CONTEXT * rows * kv_heads // programs)
    for n, warps, stages, most in _IN_TURN:
        chunk = min(max(usual, 128), _CONTEXT)
        found.append(DecodeConfig(n * least, chunk, splits_of(rows), programs, warps, stages, False, True, most))
    found += [replace(config, turn=False) for config in (rule, found[-len(_IN_TURN)])]
    return [c for c in dict.fromkeys(found) if c.stages == 1 or _resident(chip, c.tile, head_dim, c.stages)]


def decode_refinements(config: DecodeConfig, rows: int) -> list[DecodeConfig]:
    """The same code with other units and numbers of programs, itself first."""
    if config.direct:
        more = replace(
            config, chunk=max(config.tile, config.chunk // 2), splits=min(splits_of(rows), config.splits * 2)
        )
        return [config, more, replace(config, chunk=config.chunk * 2)]
    return [
        replace(config, chunk=int(config.chunk * length), programs=config.programs * turns)
        for length, turns in product((1, 0.5, 2), (1, 2, 4))
        if config.chunk * length >= config.tile
    ]


def prefill_rule(max_query: int, group: int, head_dim: int, chip: Chip) -> PrefillConfig:
    """As large a tile as keeps its sums in registers: 128 rows, 64 where chunks are short or heads wide."""
    padded = triton.next_power_of_2(head_dim)
    tile = 64 if chip.hopper and padded <= 128 else 32
    rows = 64 if padded > 128 or max_query * group <= _SHORT else 128
    stages = 3 if _prefill_bytes(rows, tile, padded, 3) <= chip.shared_bytes else 2
    warps = 8 if padded > 128 or rows == 128 else 4
    return PrefillConfig(max(rows, triton.next_power_of_2(group)), tile, warps, stages)


def prefill_candidates(max_query: int, group: int, head_dim: int, chip: Chip) -> list[PrefillConfig]:
    """What a benchmark should try, the rule's choice first."""
    padded = triton.next_power_of_2(head_dim)
    found = [
        PrefillConfig(rows, tile, warps, stages)
        for rows, tile, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        if rows >= group and _prefill_bytes(rows, tile, padded, stages) <= chip.shared_bytes
    ]
    return list(dict.fromkeys([prefill_rule(max_query, group, head_dim, chip), *found]))


def splits_of(rows: int) -> int:
    return min(MOST_SPLITS, max(4, _SPLIT_ROWS // triton.next_power_of_2(rows)))


def split_rows(rows: int) -> int:
    """The most that so many rows, or fewer, times their splits can be."""
    return max(r * splits_of(r) for r in range(1, rows + 1))


def _direct_units(rows: int, kv_heads: int, tile: int, each: int, chip: Chip) -> tuple[int, int]:
    """(chunk, splits): of usual contexts, about `each` programs for every multiprocessor; and a long context alone
    among short ones has one for each."""
    usual, alone = (max(1, n * chip.multiprocessors // pairs) for n, pairs in ((each, rows * kv_heads), (1, kv_heads)))
    usual, alone = (1 << (n.bit_length() - 1) for n in (usual, alone))
    return max(tile, _CONTEXT // usual), min(splits_of(rows), max(usual, alone))


def _resident(chip: Chip, tile: int, head_dim: int, stages: int) -> int:
    """Programs of `decode` that fit on a multiprocessor, 8 KiB of each besides the tiles."""
    needed = (stages - 1) * 4 * tile * triton.next_power_of_2(head_dim) + 8 * 1024
    return min(chip.shared_bytes // needed, 8)


def _prefill_bytes(rows: int, tile: int, padded_dim: int, stages: int) -> int:
    return 2 * padded_dim * (rows + 2 * stages * tile)
