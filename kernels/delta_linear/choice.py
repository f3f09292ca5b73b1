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
from kernels.delta_linear.compact_check import compact_check
from kernels.delta_linear.self_check import self_check
from kernels.device import Kinds, Target

Impl = Literal["flat", "signs", "unpack"]
"""flat: base tiles and sign products in one launch. signs: cuBLAS, then sign products. unpack: cuBLAS, then products
with unpacked signs. Base only, flat is base tiles alone and the others cuBLAS alone."""
RESIDENT: dict[int, list[tuple[int, int]]] = {4: [(3, 168), (4, 128), (2, 248)], 8: [(2, 128), (3, 80)]}
"""By warps: programs of a multiprocessor, and the registers that this many leave each thread"""
FLAT_ROWS = 64
"""More rows than that are cuBLAS's: accumulators of base tiles crowd out the signs that are under way."""


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one linear at one number of rows. Only their speed differs; any works for any shape."""

    impl: Impl
    split: int = 1
    """flat: parts of K; how many partials there are"""
    outputs: int = 64
    inner: int = 64
    stages: int = 4
    """flat: outputs of a base tile, its step along K, and how many steps are under way"""
    tiles: int = 4
    """Tiles of 16 outputs that one program multiplies at once"""
    warps: int = 4
    registers: int | None = None
    """Most that a thread may have: more programs at a time"""
    resident: int = 4
    """Programs of sign products per multiprocessor: they take items in turn"""

    def base_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of `Partials.base_STN`, for this compute dtype."""
        return torch.float32 if self.impl == "flat" else dtype


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
    return found or rule(target, rows, kinds, b1, multiprocessors(device))


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


def rule(target: Target, rows: int, kinds: Kinds, b1: bool, multiprocessors: int = 132) -> Config:
    """Without measurements. `b1`: whether there is a binary tensor core.

    One launch while it can hide one part's tail behind the other. Split K until there are tiles for every
    multiprocessor, less so where many rows make the partials large.
    """
    signs = sign_rule(target, rows, kinds)
    if kinds.signs and not b1:
        return replace(signs, impl="unpack", registers=None)
    if rows > FLAT_ROWS:
        return replace(signs, impl="signs")
    split, few = 1, rows <= 4
    while split < (4 if rows <= 32 else 2) and target.outputs * split < 64 * 1.2 * multiprocessors:
        split *= 2
    return replace(signs, impl="flat", split=split, inner=128 if few else 64, stages=3 if few else 4)


def sign_rule(target: Target, rows: int, kinds: Kinds) -> Config:
    """The part of the settings that is about signs: as many of them under way as registers hold unspilled."""
    if kinds.single and target.tiles[1] <= 56:
        steps = -(-target.tiles[1] // 4)
        return Config("signs", tiles=4 if steps <= 4 else 2 if steps <= 11 else 1, warps=4, resident=4, registers=128)
    blocks = target.tiles[1]
    warps = 4 if blocks <= 24 else 8
    steps = -(-blocks // warps)
    if not _plain(kinds):
        return Config("signs", tiles=4 if steps <= 4 else 2, warps=warps, resident=2)
    resident, registers = RESIDENT[warps][1 if warps == 4 else 0]
    return Config("signs", tiles=2, warps=warps, resident=resident, registers=registers)


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
    signs = _sign_candidates(target, rows) if kinds.signs else []
    found = [chosen, replace(chosen, impl="signs", split=1)]
    if rows <= 2 * FLAT_ROWS:
        found += [flat, *(replace(flat, **base) for base in _base_candidates(target))]
        found += [replace(flat, **_sign_part(s)) for s in signs]
    return list(dict.fromkeys(found + signs))


def _sign_part(config: Config) -> dict[str, int | None]:
    return {name: getattr(config, name) for name in ("tiles", "warps", "registers", "resident")}


def _base_candidates(target: Target) -> Iterator[dict[str, int]]:
    for outputs, inner, stages in ((64, 64, 4), (64, 128, 3), (64, 128, 4), (128, 64, 4)):
        for split in (1, 2, 4):
            programs = target.outputs / outputs * split
            if target.inputs >= split * inner * stages and (120 <= programs <= 800 or split == 1):
                yield {"outputs": outputs, "inner": inner, "stages": stages, "split": split}


def _sign_candidates(target: Target, rows: int) -> list[Config]:
    found: list[Config] = []
    for warps in (4, 8):
        steps = -(-target.tiles[1] // warps)
        for tiles, (resident, registers) in product((1, 2, 4), RESIDENT[warps]):
            words = 4 * steps * tiles
            if words >= 16 and words + 60 <= registers:
                found.append(Config("signs", tiles=tiles, warps=warps, resident=resident, registers=registers))
    return found


def settings(config: Config) -> dict[str, int | str | bool | None]:
    """A config as it stands in a file of measured ones."""
    return asdict(config)
