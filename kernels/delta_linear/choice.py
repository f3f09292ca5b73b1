"""Which launches make up a decode-sized linear, chosen by shape, rows, kinds of deltas and chip."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import triton

from kernels import configs
from kernels.device import Kinds, Target

Impl = Literal["flat", "signs", "unpack"]
"""flat: base tiles and sign products in one launch. signs: cuBLAS, then sign products. unpack: cuBLAS, then products
with unpacked signs. Base only, flat is base tiles alone and the others cuBLAS alone."""
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
    groups: int = 1
    tiles: int = 4
    """Tiles of 16 outputs that one program multiplies at once, and how many times"""
    warps: int = 4
    registers: int | None = None
    """Most that a thread may have: more programs at a time"""
    pdl: bool = False
    """Programmatic dependent launch, capability 9.0 on: signs are requested while the kernel before still runs. Every
    kernel in the stream must then either be launched without it or wait for its predecessor before it reads."""

    def base_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of `Partials.base_STN`, for this compute dtype."""
        return torch.float32 if self.impl == "flat" else dtype


def choose(target: Target, rows: int, kinds: Kinds, device: torch.device | str) -> Config:
    """What was measured on this chip for this shape and number of rows, else the rule."""
    device = torch.device(device)
    if device.type == "cuda":
        found = configs.lookup("delta_linear", torch.cuda.get_device_name(device), key(target, rows, kinds))
        if found is not None:
            return Config(**found)
    return rule(target, rows, kinds, capability(device), multiprocessors(device))


def key(target: Target, rows: int, kinds: Kinds) -> str:
    """What measured configurations are filed under: outputs x inputs, rows up to a power of two, signs or not."""
    return f"{target.outputs}x{target.inputs} {triton.next_power_of_2(rows)} {'signs' if kinds.signs else 'base'}"


def rule(target: Target, rows: int, kinds: Kinds, capability: tuple[int, int], multiprocessors: int = 132) -> Config:
    """Without measurements.

    One launch while it can hide one part's tail behind the other. Split K until there are tiles for every
    multiprocessor, less so where many rows make the partials large. Sign tiles as many as leave registers for 4
    programs at a time, fewer where there are few variants to fill the chip with.
    """
    signs = sign_rule(target, rows)
    if not native_b1(capability):
        return replace(signs, impl="unpack")
    if rows > FLAT_ROWS:
        return replace(signs, impl="signs")
    split = 1
    while split < (4 if rows <= 32 else 2) and target.outputs * split < 64 * 1.2 * multiprocessors:
        split *= 2
    few = rows <= 4
    return replace(signs, impl="flat", split=split, inner=128 if few else 64, stages=3 if few else 4)


def sign_rule(target: Target, rows: int) -> Config:
    """The part of the settings that is about signs."""
    blocks = target.tiles[1]
    warps = 4 if blocks <= 48 else 8
    steps = -(-blocks // warps)
    most = 1 if rows <= 2 else 2 if rows <= 16 else 4
    tiles = max(1, min(most, 2 ** ((24 // steps).bit_length() - 1) if steps <= 24 else 1))
    return Config("signs", tiles=tiles, warps=warps)


def native_b1(capability: tuple[int, int]) -> bool:
    """Chips before 8.0 have no m16n8k256, those from 10.0 on no binary tensor core."""
    return (8, 0) <= capability < (10, 0)


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where there is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def candidates(target: Target, rows: int, kinds: Kinds) -> list[Config]:
    """What a benchmark should try on a chip with a binary tensor core, the rule's choice first."""
    chosen = rule(target, rows, kinds, (9, 0))
    signs = _sign_candidates(target, rows) if kinds.signs else [chosen]
    found = [chosen]
    for outputs, inner, stages in ((64, 64, 4), (64, 128, 3), (64, 128, 4), (128, 64, 4), (128, 128, 3)):
        for split in (1, 2, 4, 8):
            programs = target.outputs / outputs * split
            if rows <= 2 * FLAT_ROWS and target.inputs >= split * inner * stages and 90 <= programs <= 1500:
                base = {"impl": "flat", "outputs": outputs, "inner": inner, "stages": stages, "split": split}
                found += [replace(s, **base) for s in signs]
    found += [replace(s, impl="signs") for s in signs]
    return list(dict.fromkeys(found))


def _sign_candidates(target: Target, rows: int) -> list[Config]:
    found = []
    for warps in (4, 8):
        steps = -(-target.tiles[1] // warps)
        for tiles in (1, 2, 4, 8):
            for groups in (1, 2):
                words = steps * tiles * groups * 4
                if 16 <= words <= 128 and (groups == 1 or rows > 4):
                    found += [Config("signs", groups=groups, tiles=tiles, warps=warps)]
                    found += [replace(found[-1], registers=65536 // (128 * warps))] if words <= 64 else []
    return found


def settings(config: Config) -> dict[str, object]:
    """A config as it stands in a file of measured ones."""
    return asdict(config)
