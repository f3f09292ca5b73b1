"""What an engine can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from bitdelta_core.engine import shared_memory
from bitdelta_core.errors import InvalidRequest

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DecoderName = Literal["auto", "device", "torch"]
LoaderName = Literal["auto", "thread", "process"]
_AT_LEAST_ONE = (
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_variants_per_step",
    "fetch_threads",
    "load_threads",
    "max_resident_variants",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Names are vLLM's where it has the same thing. None: chosen from what the machine has at the start."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: the first GPU, or else the CPU."""
    dtype: DType = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    decoder: DecoderName = "auto"
    """device: Triton kernels and CUDA graphs; torch: any device. auto: the first on a GPU where it supports the model,
    else the second; which one, and why, is logged and stands in `Engine.memory`."""
    enforce_eager: bool = False
    """No CUDA graphs: every kernel of every step is launched by itself."""
    cuda_graph_sizes: tuple[int, ...] | None = None
    """Numbers of decoding sequences for which steps are captured; others are padded to the next. None: 1, 2, 4, 8, 16,
    24, 32, 48, 64 and so on up to max_num_seqs."""
    cuda_graph_deltas: tuple[str, ...] = ()
    """Directories of deltas. Steps for variants that are like them are captured at the start, as those of the base are;
    for other kinds of variants when a step first needs it. Empty: those that `Engine(published=...)`
    tells of, else like what `bitdelta compress` writes by default."""
    async_scheduling: bool = True
    """On a GPU: launch the next step while one runs. What ends a choice is then seen one step late."""
    gpu_memory_utilization: float = 0.9
    """How much of a GPU's memory is used in all: base, slab, KV, working memory, graphs and what others hold."""
    max_model_len: int | None = None
    """Longest context of any variant. None: each variant's own."""
    block_size: int = 16
    """Tokens per KV block."""
    num_kv_blocks: int | None = None
    kv_cache_bytes: int | None = None
    """The same in bytes; giving both is refused."""
    slab_bytes: int | None = None
    """Device memory for deltas. On a GPU, None and kv_cache_bytes None share what is left half and half."""
    max_resident_variants: int = 256
    """Deltas in the slab at the same time, at most. Device tables have an entry for each."""
    host_cache_bytes: int = 0
    """Host memory, pinned on a GPU, that keeps copies of deltas for their next time. On a CPU the page cache does."""
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
    loader: LoaderName = "auto"
    """Who reads deltas into host buffers. process: processes (Linux), so that running steps have the interpreter for
    themselves, half as many as there are cores, load_threads to 8; a delta with much to decode is several's. thread:
    threads of this process. auto: the first on a GPU, else the second."""
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
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidRequest(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}",
                param="gpu_memory_utilization",
            )
        if self.cuda_graph_sizes is not None and min(self.cuda_graph_sizes, default=1) < 1:
            raise InvalidRequest("cuda_graph_sizes must be at least 1", param="cuda_graph_sizes")
        if self.decoder not in get_args(DecoderName):
            raise InvalidRequest(f"decoder must be auto, device or torch, got {self.decoder}", param="decoder")
        if self.loader not in get_args(LoaderName):
            raise InvalidRequest(f"loader must be auto, thread or process, got {self.loader}", param="loader")
        if self.loader == "process" and not shared_memory.available():
            raise InvalidRequest("loader=process: this system has no memfd_create", param="loader")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InvalidRequest(f"dtype must be auto or one of {', '.join(DTYPES)}, got {self.dtype}", param="dtype")

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def loads_in_processes(self) -> bool:
        if self.loader == "auto":
            return self.torch_device.type == "cuda" and shared_memory.available()
        return self.loader == "process"

    @property
    def graph_sizes(self) -> tuple[int, ...] | None:
        """What is captured; empty: nothing; None: the default."""
        return () if self.enforce_eager else self.cuda_graph_sizes

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32
        return DTYPES[self.dtype]
