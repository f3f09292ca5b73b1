"""Which decoder computes, and everything that depends on it: the runner, the form of deltas, the device tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bitdelta_core.engine.accelerator import Accelerator
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.memory import Fixed, MemoryPlan
from bitdelta_core.engine.residency import Tables
from bitdelta_core.engine.runner import Runner
from bitdelta_core.engine.slab import Slab
from bitdelta_core.engine.startup import Stages
from bitdelta_core.engine.torch_runner import TorchRunner
from bitdelta_core.errors import InvalidRequest
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.decoder import Decoder, kv_bytes_per_block
from bitdelta_core.models.weights import Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is wired from, beside its scheduler."""

    runner: Runner
    slab: Slab
    tables: Tables | None
    memory: MemoryPlan
    """With what has been measured"""


class Backend(Protocol):
    name: str
    """For the memory table"""

    def fixed_memory(self, config: EngineConfig) -> Fixed:
        """What it takes beside slab and KV cache."""
        ...

    def weights(self, layout: Any, extent: torch.Tensor) -> Any:
        """What the runner wants of a variant whose bytes are in `extent`."""
        ...

    def build(
        self, config: EngineConfig, memory: MemoryPlan, max_model_len: int, expected: Sequence[Any], stages: Stages
    ) -> Parts:
        """Take the memory, and prepare for variants that are like the `expected` layouts."""
        ...


class TorchBackend:
    """torch operations on any device."""

    def __init__(self, decoder: Decoder, accelerator: Accelerator, why: str) -> None:
        self.name = f"torch ({why})"
        self._decoder = decoder
        self._accelerator = accelerator

    def fixed_memory(self, config: EngineConfig) -> Fixed:
        c, size = self._decoder.config, config.torch_dtype.itemsize
        activations = config.max_num_batched_tokens * 6 * (c.hidden_size + c.intermediate_size) * size
        sampling = config.max_num_seqs * c.vocab_size * 64
        return Fixed(
            block_bytes=kv_bytes_per_block(c, config.block_size, config.torch_dtype),
            base_bytes=weight_bytes(self._decoder.weights),
            work_bytes=activations + sampling if config.torch_device.type == "cuda" else 0,
        )

    def weights(self, layout: Any, extent: torch.Tensor) -> Any:
        return layout.view(extent)

    def build(
        self, config: EngineConfig, memory: MemoryPlan, max_model_len: int, expected: Sequence[Any], stages: Stages
    ) -> Parts:
        kv = self._decoder.new_kv_cache(memory.num_kv_blocks, memory.block_size)
        runner = TorchRunner(self._decoder, kv, block_size=memory.block_size, device=memory.device)
        slab = Slab(memory.slab_bytes, memory.device, max_extents=memory.slots)
        stages.ended("memory")
        return Parts(runner, slab, None, memory)


def choose(config: EngineConfig, model: ModelConfig) -> tuple[bool, str]:
    """(whether the device decoder computes, why).

    Raises:
        InvalidRequest: it is asked for by name, and cannot.
    """
    if config.decoder == "torch":
        return False, "asked for"
    if config.decoder == "auto" and config.torch_device.type != "cuda":
        return False, "no GPU"
    why_not = _obstacle(config, model)
    if why_not is None:
        return True, ""
    if config.decoder == "device":
        raise InvalidRequest(f"decoder=device: {why_not}", param="decoder")
    log.warning("the device decoder does not serve this engine, torch does, many times slower: %s", why_not)
    return False, why_not


def _obstacle(config: EngineConfig, model: ModelConfig) -> str | None:
    device = config.torch_device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton has no kernels for {device.type}; TRITON_INTERPRET=1 emulates them, for tests"
    try:
        from bitdelta_core.models.device.decoder import MAX_ROWS, DeviceDecoder
    except ImportError as error:
        return f"it cannot be imported: {error}"
    if config.max_num_seqs > MAX_ROWS:
        return f"max_num_seqs={config.max_num_seqs}, at most {MAX_ROWS}"
    if config.block_size < 8 or config.block_size & (config.block_size - 1):
        return f"block_size={config.block_size} is no power of two of at least 8"
    return DeviceDecoder.supports(model, config.torch_dtype, device)


def weight_bytes(weights: Weights) -> int:
    """A tied head counts once."""
    return weights.vectors_V.nbytes + sum({t.data_ptr(): t.nbytes for t in weights.targets.values()}.values())
