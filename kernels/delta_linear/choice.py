"""Which launches make up a decode-sized linear, chosen by shape, rows, kinds of deltas and chip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
import triton

from kernels import configs
from kernels.delta_linear import gluon_ring, gluon_rows
from kernels.delta_linear.compact_check import compact_check
from kernels.delta_linear.ring_check import ring_check
from kernels.delta_linear.self_check import self_check
from kernels.device import Kinds, Target

Impl = Literal["ring", "flat", "stream", "signs", "unpack"]
"""flat: base tiles and sign products in one launch. signs: cuBLAS, then sign products. unpack: cuBLAS, then products
with unpacked signs. Base only, flat is base tiles alone and the others cuBLAS alone. ring and stream: as flat and signs
do, by the hands of `gluon_ring` and, where a variant has several rows, `gluon_rows`."""
FLAT_ROWS = 32
"""Of the base alone, and of variants with a row each, more rows than that are cuBLAS's: measured 48 against 58 us of a
7B's gate and up, at 64 rows of the base"""
_SHARED_BYTES = 100 * 1024
"""Of a program, where two share a multiprocessor of Hopper"""
_STEPS = 16
"""Blocks of 256 columns of a row of which a thread holds the planes: 64 registers"""


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one linear at one number of rows. Only their speed differs; any works for any shape."""

    impl: Impl
    outputs: int = 64
    inner: int = 64
    stages: int = 4
    """flat: outputs of a base tile, its step along K, and how many steps are under way"""
    tiles: int = 4
    """Tiles of 16 outputs that a program multiplies at once with a row"""
    spread: int = 1
    """Warps that share the columns of a tile then. tiles * spread is a multiple of warps"""
    depth: int = 3
    """How many times so many tiles are at some stage: all but one in shared memory"""
    warps: int = 4
    registers: int | None = None
    """Most that a thread may have"""
    resident: int = 2
    """Programs of each multiprocessor. There are no more than run at once"""

    def base_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of `Partials.base_STN`, for this compute dtype."""
        return torch.float32 if self.impl in ("flat", "ring") else dtype

    def programs(self, device: torch.device | str) -> int:
        return self.resident * multiprocessors(torch.device(device))

    def sharing(self, target: Target, width: int, device: torch.device | str) -> int:
        """How many programs have a share of the base: each at least one step."""
        return min(self.programs(device), triton.cdiv(width, self.outputs) * triton.cdiv(target.inputs, self.inner))

    def split(self, target: Target, width: int, device: torch.device | str) -> int:
        """The most programs that share a tile of the base: how many partials there are."""
        if self.impl not in ("flat", "ring"):
            return 1
        steps, tiles = triton.cdiv(target.inputs, self.inner), triton.cdiv(width, self.outputs)
        return most_sharing(self.sharing(target, width, device), tiles, steps)


@lru_cache(maxsize=256)
def most_sharing(programs: int, tiles: int, steps: int) -> int:
    """The most programs that share a tile, all steps of all tiles being dealt out. Remembered: every launch asks."""
    total = tiles * steps
    return 1 + max(
        program_of(end - 1, programs, total) - program_of(end - steps, programs, total)
        for end in range(steps, total + 1, steps)
    )


def program_of(one: int, programs: int, total: int) -> int:
    """Whose share one of so many is in: `triton_share.program_of`."""
    each, more = divmod(total, programs)
    longer = more * (each + 1)
    return one // (each + 1) if one < longer else more + (one - longer) // each


def choose(target: Target, rows: int, kinds: Kinds, device: torch.device | str) -> Config:
    """What was measured on this chip for this shape and the nearest number of rows, else the rule; signs are unpacked
    where the binary tensor core is missing or fails its check."""
    device = torch.device(device)
    if device.type != "cuda":
        return rule(target, rows, kinds, b1=False)
    b1 = self_check(device).ok if kinds.signs else True
    if kinds.compact:
        compact_check(device)  # before capture: `compact.choose` wants to know while a graph is made
    found = _measured(target, rows, kinds, torch.cuda.get_device_name(device)) if b1 else None
    found = found or rule(target, rows, kinds, b1, _shared_bytes(device))
    by_ring = gluon_ring.supports(target, kinds, device) and ring_check(device).ok
    return ringed(found, rows, kinds) if by_ring else found


def ringed(config: Config, rows: int, kinds: Kinds) -> Config:
    """As `gluon_ring` or `gluon_rows` does what this does. There is nothing to set but where the base's tiles are."""
    several = kinds.signs and not kinds.single and rows > 1
    resident, most = (1, gluon_rows.MOST_ROWS) if several else (2, gluon_ring.MAX_ROWS)
    if config.impl not in ("flat", "signs"):
        return config
    if rows <= most and (several or config.impl == "flat"):
        return replace(config, impl="ring", outputs=gluon_ring.OUTPUTS, inner=gluon_ring.INNER, resident=resident)
    return replace(config, impl="stream", resident=resident)


def _measured(target: Target, rows: int, kinds: Kinds, device_name: str) -> Config | None:
    """Of the nearest number of rows. Many rows take nothing of few: accumulators of base tiles grow with them."""
    fewest = FLAT_ROWS + 1 if rows > FLAT_ROWS else 1
    found = configs.nearest("delta_linear", device_name, rows, lambda n: key(target, n, kinds), fewest=fewest)
    return Config(**found[1]) if found else None


def key(target: Target, rows: int, kinds: Kinds) -> str:
    """What measured configurations are filed under: outputs x inputs, rows up to a power of two, which kernels.

    Several planes, or column scales, take more registers than one plane without.
    """
    kernels = (("single" if kinds.single else "signs") if _plain(kinds) else "planes") if kinds.signs else "base"
    return f"{target.outputs}x{target.inputs} {triton.next_power_of_2(rows)} {kernels}"


def _plain(kinds: Kinds) -> bool:
    return kinds.planes == 1 and not kinds.columns


def rule(target: Target, rows: int, kinds: Kinds, b1: bool, shared: int = _SHARED_BYTES) -> Config:
    """Without measurements: as much under way as shared memory holds.

    Args:
        b1: whether there is a binary tensor core. shared: bytes that each of two programs has.
    """
    several = kinds.signs and not kinds.single and rows > 1
    if rows > FLAT_ROWS and not several and shared >= _SHARED_BYTES:
        signs = replace(signs_with(target, 2 * shared // 3), resident=3, registers=168)
    else:
        # Few enough registers that the kernels after it find room before it ends.
        signs = replace(signs_with(target, shared), registers=None if several or not kinds.signs else 168)
    if kinds.signs and not b1:
        return replace(signs, impl="unpack", registers=None)
    if rows > FLAT_ROWS:
        # Several rows of a variant keep the cores busy, not the memory, and the base's tiles the other way round:
        # measured at 64 rows of 8 variants 56 against 63 us of a 7B's qkv.
        both = several and rows <= 2 * FLAT_ROWS and shared >= _SHARED_BYTES
        return replace(signs, impl="flat", outputs=64, inner=64, stages=4) if both else replace(signs, impl="signs")
    step = 2 * 128 * (64 + max(16, triton.next_power_of_2(rows)))
    return replace(signs, impl="flat", outputs=64, inner=128, stages=max(2, min(4, shared // step)))


def signs_with(target: Target, shared: int) -> Config:
    """Settings of sign products. A warp has a tile's columns to itself if its registers hold a row's planes."""
    blocks, spread, warps = target.tiles[1], 1, 4
    while spread < warps and triton.cdiv(blocks, spread) > _STEPS:
        spread *= 2
    tiles = warps // spread
    depth = max(2, min(6, 1 + shared // (tiles * blocks * 512)))
    return Config("signs", tiles=tiles, spread=spread, depth=depth, warps=warps)


def _shared_bytes(device: torch.device) -> int:
    """Of each of two programs on a multiprocessor, less what the launch itself takes."""
    found = torch.cuda.get_device_properties(device)
    return min(_SHARED_BYTES, found.shared_memory_per_multiprocessor // 2 - 4096)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of no real device few, so that programs have several items there too."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def candidates(target: Target, rows: int, kinds: Kinds) -> list[Config]:
    """What a benchmark should try on a chip with a binary tensor core, the rule's choice first.

    Base and sign settings vary one after the other, not all with all: each takes seconds to compile.
    """
    chosen = rule(target, rows, kinds, b1=True)
    flat = rule(target, min(rows, FLAT_ROWS), kinds, b1=True)
    signs = _sign_candidates(target) if kinds.signs else []
    one = [large(target)] if kinds.signs and not kinds.single and rows > 1 else []
    found = [chosen, replace(chosen, impl="signs")]
    if rows <= 2 * FLAT_ROWS:
        found += [flat, *(replace(flat, **base) for base in _base_candidates(rows))]
        found += [fitting(replace(flat, **_sign_part(s)), rows) for s in signs]
    return list(dict.fromkeys(found + signs + one))


def fitting(config: Config, rows: int) -> Config:
    """With as many stages of base tiles as leave room for all programs of a multiprocessor of Hopper."""
    step = 2 * config.inner * (config.outputs + max(16, triton.next_power_of_2(rows)))
    return replace(config, stages=max(2, min(config.stages, 2 * _SHARED_BYTES // config.resident // step)))


def _sign_part(config: Config) -> dict[str, int | None]:
    return {name: getattr(config, name) for name in ("tiles", "spread", "depth", "warps", "registers", "resident")}


def _base_candidates(rows: int) -> Iterator[dict[str, int]]:
    inputs = max(16, triton.next_power_of_2(min(rows, FLAT_ROWS)))
    for outputs, inner in product((64, 128), (64, 128)):
        stages = min(6, _SHARED_BYTES // (2 * inner * (outputs + inputs)))
        if stages > 1:
            yield {"outputs": outputs, "inner": inner, "stages": stages}


def _sign_candidates(target: Target) -> list[Config]:
    usual, found = signs_with(target, _SHARED_BYTES), []
    for spread, steps, resident in product(sorted({usual.spread, usual.warps}), (1, 2, 4), (2, 3)):
        config = replace(usual, spread=spread, tiles=steps * usual.warps // spread, resident=resident)
        config = replace(config, registers=168 if resident == 3 else None)
        depth = 1 + 2 * _SHARED_BYTES // (resident * config.tiles * target.tiles[1] * 512)
        if 3 <= depth <= 9 and (steps == 1 or spread == usual.warps):
            found.append(replace(config, depth=depth))
    return found


def large(target: Target) -> Config:
    """One program of twice as many warps instead of two: several rows of a variant are read half as often."""
    usual = signs_with(target, 2 * _SHARED_BYTES)
    return replace(usual, warps=2 * usual.warps, spread=2 * usual.spread, resident=1)


def settings(config: Config) -> dict[str, int | str | bool | None]:
    """A config as it stands in a file of measured ones."""
    return asdict(config)
