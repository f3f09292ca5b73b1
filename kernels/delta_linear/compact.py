"""Deltas of which one input of many is kept, in decode-sized segments: which kernel, with which settings."""

# Triton's launchers take options that a kernel's signature does not have:
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton

from kernels import configs, launches
from kernels.delta_linear import triton_parts as parts
from kernels.delta_linear.choice import multiprocessors
from kernels.delta_linear.compact_check import compact_check
from kernels.delta_linear.triton_compact import compact_kernel
from kernels.delta_linear.triton_compact_unpack import compact_unpack
from kernels.device import DeviceDeltas, Kinds, Target


@dataclass(frozen=True, slots=True)
class CompactConfig:
    """Only speed differs; any works for any shape, but `tiles` beyond 1 wants masks of as many tile rows."""

    impl: Literal["b1", "unpack"] = "b1"
    tiles: int = 4
    """Tiles of 16 outputs of a warp: no more than share a mask"""
    warps: int = 4
    resident: int = 4
    """Programs per multiprocessor: they take items in order, each an even share"""
    registers: int | None = 128
    """Most that a thread may have: more programs at a time"""


def key(target: Target, rows: int, kinds: Kinds) -> str:
    """What measured configurations are filed under."""
    masks = "tall" if kinds.tall else "short"
    return f"compact {target.outputs}x{target.inputs} {triton.next_power_of_2(rows)} {kinds.compact} {masks}"


def choose(target: Target, rows: int, kinds: Kinds, device: torch.device) -> CompactConfig:
    """What was measured on this device, else the rule; values are unpacked where the binary tensor core is missing or
    fails its check."""
    if device.type != "cuda" or not compact_check(device).ok:
        return CompactConfig("unpack")
    name = torch.cuda.get_device_name(device)
    found = configs.nearest("delta_linear", name, rows, lambda n: key(target, n, kinds))
    return CompactConfig(**found[1]) if found else rule(kinds)


def rule(kinds: Kinds) -> CompactConfig:
    """Without measurements: all tiles of a mask block to a warp, so that x is gathered once for it, unless its values
    would not fit into registers; then as many programs as these allow."""
    if not kinds.tall:
        return CompactConfig(tiles=1, resident=6, registers=80)
    return CompactConfig() if kinds.compact <= 2 else CompactConfig(tiles=2, resident=5, registers=96)


def candidates(kinds: Kinds) -> list[CompactConfig]:
    """For a benchmark's sweep, the rule's choice first."""
    found = [rule(kinds), CompactConfig(tiles=1, resident=6, registers=80)]
    if kinds.tall:
        found += [CompactConfig(tiles=2, resident=6, registers=80)]
    found += [CompactConfig(tiles=1), CompactConfig(tiles=found[0].tiles, warps=8, resident=2)]
    return list(dict.fromkeys(found))


def compact(
    x_TK: torch.Tensor, target: Target, deltas: DeviceDeltas, segments_G4: torch.Tensor, kinds: Kinds,
    delta_TN: torch.Tensor, *, add: bool, config: CompactConfig | None = None,
) -> None:  # fmt: skip
    """Writes x D^T of every segment to its rows of delta, zeros where its variant keeps nothing; or adds it.

    Safe to capture. Reads x itself: no planes of it need be there.

    Args:
        delta_TN: float32, contiguous; at least as wide as the widest variant.
    """
    parts.check_rows(x_TK, target)
    assert kinds.compact > 0
    assert delta_TN.is_contiguous()
    config = config or choose(target, x_TK.shape[0], kinds, x_TK.device)
    if config.impl == "unpack":
        compact_unpack(x_TK, target, deltas, segments_G4, delta_TN, add=add)
        return
    assert config.tiles == 1 or (kinds.tall and config.tiles <= 4), f"{config.tiles} tiles of masks of 16 rows"
    width, pdl = delta_TN.shape[1], launches.early(x_TK)
    chunks = triton.cdiv(width, 16 * config.tiles * config.warps)
    items, at_once = segments_G4.shape[0] * chunks, config.resident * multiprocessors(x_TK.device)
    options = {"num_warps": config.warps, **launches.options(pdl)}
    if config.registers:
        options["maxnreg"] = config.registers
    compact_kernel[(min(items, at_once),)](
        x_TK, x_TK.stride(0), *parts.table_arguments(deltas, target), segments_G4, delta_TN, target.outputs, width,
        chunks, K=target.inputs, BITS=kinds.compact, TILES=config.tiles, WARPS=config.warps, ADD=add,
        EARLY=items <= at_once, PDL=pdl, **options,
    )  # fmt: skip
