"""What an engine can be told, and what it makes of the memory that it finds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bitdelta_core.errors import InvalidRequest

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_KV_SHARE, CPU_SLAB_SHARE = 0.1, 0.2
_AT_LEAST_ONE = (
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_variants_per_step",
    "fetch_threads",
    "load_threads",
)
GPU_KV_SHARE, GPU_SLAB_SHARE = 0.45, 0.45


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Names are vLLM's where it has the same thing. None: chosen from what the machine has free at the start."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: the first GPU, or else the CPU."""
    dtype: DType = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    max_model_len: int | None = None
    """Longest context of any variant. None: each variant's own."""
    block_size: int = 16
    """Tokens per KV block."""
    num_kv_blocks: int | None = None
    kv_cache_bytes: int | None = None
    """The same in bytes; giving both is refused."""
    slab_bytes: int | None = None
    """Device memory for deltas."""
    host_cache_bytes: int = 0
    """Host memory that keeps copies of deltas which left the slab. On a CPU the page cache does that."""
    max_num_seqs: int = 64
    """Choices computed together."""
    max_num_batched_tokens: int = 1024
    """Rows of one step; longer prompts are computed in chunks."""
    max_variants_per_step: int = 64
    """Distinct deltas of one step: each costs its bytes in bandwidth."""
    max_waiting: int = 1024
    """Choices that may wait beyond max_num_seqs before callers get Overloaded."""
    enable_prefix_caching: bool = True
    fetch_threads: int = 4
    """Deltas fetched from the source at the same time."""
    load_threads: int = 2
    """Deltas read into host buffers at the same time; bounds the host memory that loading takes."""
    delta_retry_s: float = 30.0
    """How long a delta that failed to load is refused before it is tried again."""
    slab_patience_s: float = 2.0
    """How long a delta waits for room in a slab full of pins before later requests for other deltas are held back."""
    seed: int | None = None
    """Of requests that bring none. None: from the operating system."""

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {getattr(self, name)}", param=name)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequest(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: every decoding sequence needs its row",
                param="max_num_batched_tokens",
            )
        if self.num_kv_blocks is not None and self.kv_cache_bytes is not None:
            raise InvalidRequest("give num_kv_blocks or kv_cache_bytes, not both", param="kv_cache_bytes")
        if self.num_kv_blocks is not None and self.num_kv_blocks < 2:
            raise InvalidRequest("num_kv_blocks must be at least 2: one is reserved", param="num_kv_blocks")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InvalidRequest(f"dtype must be auto or one of {', '.join(DTYPES)}, got {self.dtype}", param="dtype")

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32
        return DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """How the engine divides the memory that was free after the base was loaded."""

    device: torch.device
    dtype: torch.dtype
    free_bytes: int
    block_size: int
    block_bytes: int
    """K and V of one block, all layers."""
    num_kv_blocks: int
    slab_bytes: int

    @property
    def kv_tokens(self) -> int:
        return (self.num_kv_blocks - 1) * self.block_size

    def table(self) -> str:
        """For humans."""
        rows = [
            ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}"),
            ("free memory", _gb(self.free_bytes)),
            ("KV cache", f"{_gb(self.num_kv_blocks * self.block_bytes)}, {self.kv_tokens} tokens"),
            ("slab", _gb(self.slab_bytes)),
        ]
        return "\n".join(f"{name:<12} {value}" for name, value in rows)


def plan_memory(config: EngineConfig, *, block_bytes: int) -> MemoryPlan:
    """Decide the sizes of KV cache and slab.

    Raises:
        InvalidRequest: less than two KV blocks fit.
    """
    device = config.torch_device
    free = _free_bytes(device)
    kv_share, slab_share = (GPU_KV_SHARE, GPU_SLAB_SHARE) if device.type == "cuda" else (CPU_KV_SHARE, CPU_SLAB_SHARE)
    kv_bytes = int(free * kv_share) if config.kv_cache_bytes is None else config.kv_cache_bytes
    blocks = kv_bytes // block_bytes if config.num_kv_blocks is None else config.num_kv_blocks
    if blocks < 2:
        raise InvalidRequest(
            f"{_gb(kv_bytes)} hold {blocks} KV blocks of {block_bytes} bytes, at least 2 are needed",
            param="kv_cache_bytes",
        )
    return MemoryPlan(
        device=device,
        dtype=config.torch_dtype,
        free_bytes=free,
        block_size=config.block_size,
        block_bytes=block_bytes,
        num_kv_blocks=blocks,
        slab_bytes=int(free * slab_share) if config.slab_bytes is None else config.slab_bytes,
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # page cache counts as available there; what sysconf calls free leaves it out
        return 1024 * int(re.findall(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
