"""How an engine divides the memory that it finds.

On a GPU it takes `gpu_memory_utilization` of all there is, what the base and others hold included. Of what is left,
working memory and graphs come first, then what the config gives to slab and KV cache in bytes; what it leaves open
shares the rest. Graphs are captured after the KV cache has been taken, so their part is a reserve until it is measured.
On a CPU slab and KV cache take fixed shares of what is free.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.errors import InvalidRequest

CPU_KV_SHARE, CPU_SLAB_SHARE = 0.1, 0.2
GRAPHS_RESERVE, GRAPH_RESERVE = 256 * 2**20, 10 * 2**20
"""Kept free for what is loaded and captured: in all (kernels, library workspaces), and for each graph,
of which those of a 7B took 2 MB each on an H200."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """What is taken whatever the config says of slab and KV cache."""

    block_bytes: int
    """K and V of one block, all layers"""
    base_bytes: int
    """Of the base's weights, which are loaded already"""
    work_bytes: int = 0
    """Activations, metadata and sampling of the largest steps"""
    graph_bytes: int = 0
    """Reserved for CUDA graphs"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes, if not said otherwise."""

    device: torch.device
    dtype: torch.dtype
    decoder: str
    """Which decoder computes, and why where it is not the usual one"""
    total_bytes: int
    """Of the device"""
    free_bytes: int
    """After the base was loaded"""
    fixed: Fixed
    block_size: int
    num_kv_blocks: int
    slab_bytes: int
    slots: int
    """Deltas that the slab may hold"""

    @property
    def block_bytes(self) -> int:
        return self.fixed.block_bytes

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_blocks * self.block_bytes

    @property
    def kv_tokens(self) -> int:
        return (self.num_kv_blocks - 1) * self.block_size

    @property
    def left_bytes(self) -> int:
        """What stays free."""
        return self.free_bytes - self.fixed.work_bytes - self.fixed.graph_bytes - self.kv_bytes - self.slab_bytes

    def table(self) -> str:
        """For humans."""
        rows = [
            ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {_gb(self.total_bytes)}"),
            ("decoder", self.decoder),
            ("base", _gb(self.fixed.base_bytes)),
            ("others", _gb(max(0, self.total_bytes - self.free_bytes - self.fixed.base_bytes))),
            ("working", _gb(self.fixed.work_bytes)),
            ("graphs", _gb(self.fixed.graph_bytes)),
            ("slab", f"{_gb(self.slab_bytes)}, up to {self.slots} variants"),
            ("KV cache", f"{_gb(self.kv_bytes)}, {self.kv_tokens} tokens"),
            ("left free", _gb(self.left_bytes)),
        ]
        return "\n".join(f"{name:<12} {value}" for name, value in rows)


def plan_memory(config: EngineConfig, fixed: Fixed, *, decoder: str = "torch") -> MemoryPlan:
    """Decide the sizes of KV cache and slab.

    Raises:
        InvalidRequest: less than two KV blocks fit, or what the config asks for does not.
    """
    device = config.torch_device
    free, total = _memory(device)
    given_kv = config.kv_cache_bytes
    if config.num_kv_blocks is not None:
        given_kv = config.num_kv_blocks * fixed.block_bytes
    if device.type == "cuda":
        kv_bytes, slab_bytes = _divide(config, fixed, given_kv, free, total)
    else:
        kv_bytes = int(free * CPU_KV_SHARE) if given_kv is None else given_kv
        slab_bytes = int(free * CPU_SLAB_SHARE) if config.slab_bytes is None else config.slab_bytes
    blocks = kv_bytes // fixed.block_bytes
    if blocks < 2:
        raise InvalidRequest(
            f"{_gb(kv_bytes)} hold {blocks} KV blocks of {fixed.block_bytes} bytes, at least 2 are needed",
            param="kv_cache_bytes",
        )
    return MemoryPlan(
        device=device,
        dtype=config.torch_dtype,
        decoder=decoder,
        total_bytes=total,
        free_bytes=free,
        fixed=fixed,
        block_size=config.block_size,
        num_kv_blocks=blocks,
        slab_bytes=slab_bytes,
        slots=config.max_resident_variants,
    )


def _divide(config: EngineConfig, fixed: Fixed, given_kv: int | None, free: int, total: int) -> tuple[int, int]:
    """(KV cache, slab) of a GPU."""
    usable = int(total * config.gpu_memory_utilization) - (total - free)
    left = usable - fixed.work_bytes - fixed.graph_bytes - (given_kv or 0) - (config.slab_bytes or 0)
    if left < 0:
        raise InvalidRequest(
            f"gpu_memory_utilization={config.gpu_memory_utilization} of {_gb(total)} leaves {_gb(max(0, usable))} "
            f"beside the {_gb(total - free)} in use (base: {_gb(fixed.base_bytes)}), but working memory takes "
            f"{_gb(fixed.work_bytes)}, graphs {_gb(fixed.graph_bytes)}, KV cache {_gb(given_kv or 0)} and slab "
            f"{_gb(config.slab_bytes or 0)} as given: ask for less, or raise gpu_memory_utilization",
            param="gpu_memory_utilization",
        )
    match given_kv, config.slab_bytes:
        case None, None:
            return left - left // 2, left // 2
        case None, slab:
            return left, slab
        case kv, None:
            return kv, left
        case kv, slab:
            return kv, slab


def _memory(device: torch.device) -> tuple[int, int]:
    """(free, total)"""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took for a moment
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # page cache counts as available there; what sysconf calls free leaves it out
        return 1024 * int(re.findall(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)[0]), total
    return total // 2, total


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
