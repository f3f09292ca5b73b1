"""The device decoder's engine: Triton kernels, device tables, graphs. Imports Triton."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bitdelta_core.engine import compilations
from bitdelta_core.engine.accelerator import Accelerator, Plain
from bitdelta_core.engine.backend import Parts, weight_bytes
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.device_runner import DeviceRunner, Limits
from bitdelta_core.engine.expected import MOST
from bitdelta_core.engine.memory import GRAPH_RESERVE, GRAPHS_RESERVE, Fixed, MemoryPlan
from bitdelta_core.engine.slab import Slab
from bitdelta_core.engine.startup import Stages
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.decoder import kv_bytes_per_block
from bitdelta_core.models.device.decoder import DeviceDecoder
from bitdelta_core.models.device.layout import DeviceLayout, widest_vocabulary
from bitdelta_core.models.device.tables import DeltaTables
from bitdelta_core.models.weights import Weights
from kernels.compiling import together
from kernels.delta_linear.ring_check import ring_check
from kernels.delta_linear.self_check import self_check

log = logging.getLogger(__name__)
MOST_COMPILERS = 16
"""Threads; each takes some hundred MB of host memory"""
_NO_DECODER: Any = None
"""Of a runner that only counts its memory"""


class OrderedTables:
    """Writes to the device tables, in the order of the steps."""

    def __init__(self, tables: DeltaTables, accelerator: Accelerator) -> None:
        self._tables = tables
        self._accelerator = accelerator

    def publish(self, slot: int, weights: DeviceLayout, extent_start: int) -> None:
        with self._accelerator.in_steps():
            self._tables.publish(slot, weights, extent_start)

    def clear(self, slot: int) -> None:
        with self._accelerator.in_steps():
            self._tables.clear(slot)


class DeviceBackend:
    """See `backend.Backend`."""

    name = "device kernels"

    def __init__(self, model: ModelConfig, weights: Weights, accelerator: Accelerator) -> None:
        self._model = model
        self._weights = weights
        self._accelerator = accelerator
        self._dtype = weights.vectors_V.dtype
        compilations.watch()
        compilations.expect(True)

    def fixed_memory(self, config: EngineConfig) -> Fixed:
        limits = self._limits(config, config.max_model_len or self._model.context_len)
        on_nothing = Plain(torch.device("meta"))
        runner = DeviceRunner(_NO_DECODER, None, on_nothing, limits, sizes=config.graph_sizes, depth=1)
        vectors_V = self._weights.vectors_V
        probe = self._decoder(Slab(0, vectors_V.device, reserved=DeltaTables.base_bytes(vectors_V)), 0)
        work = probe.work_bytes(config.max_num_seqs, config.max_num_batched_tokens)
        return Fixed(
            block_bytes=kv_bytes_per_block(self._model, config.block_size, self._dtype),
            base_bytes=weight_bytes(self._weights),
            work_bytes=work + runner.nbytes,
            graph_bytes=_graph_reserve(len(runner.graphs.sizes), config),
        )

    def weights(self, layout: Any, extent: torch.Tensor) -> Any:
        """The layout itself: kernels find the bytes through the tables."""
        return layout

    def build(
        self, config: EngineConfig, memory: MemoryPlan, max_model_len: int, expected: Sequence[Any], stages: Stages
    ) -> Parts:
        vectors_V, accelerator = self._weights.vectors_V, self._accelerator
        reserved = DeltaTables.base_bytes(vectors_V)
        slab = Slab(memory.slab_bytes, memory.device, reserved=reserved, max_extents=memory.slots)
        decoder = self._decoder(slab, memory.slots)
        kv = decoder.new_kv_cache(memory.num_kv_blocks, memory.block_size)
        accelerator.synchronize()
        stages.ended("memory")
        checked = _check_products(memory.device)
        stages.ended("self-check")
        kv.blocks_LB2GSD[:, 0].zero_()  # nobody's, but padding is computed with it
        decoder.reserve(config.max_num_seqs, config.max_num_batched_tokens)
        limits = self._limits(config, max_model_len)
        depth = int(config.async_scheduling)
        runner = DeviceRunner(decoder, kv, accelerator, limits, sizes=config.graph_sizes, depth=depth)
        accelerator.synchronize()  # what was written so far was not written in the order of steps
        free = accelerator.free_bytes()
        kinds = [layout.kinds for layout in expected] if memory.slots else []
        if memory.device.type == "cuda":
            with decoder.few_layers(), together(min(MOST_COMPILERS, os.cpu_count() or 1)):
                runner.launch_each(kinds)
            accelerator.synchronize()
            stages.ended("kernels")
        runner.warm_up(kinds)
        compilations.expect(False)
        accelerator.synchronize()
        stages.ended("graphs")
        measured = max(0, free - accelerator.free_bytes())
        if measured > memory.fixed.graph_bytes:
            log.warning(
                "graphs, kernels and libraries took %.2f GB, %.2f GB had been kept for them: lower "
                "gpu_memory_utilization if memory runs out",
                *(n / 1e9 for n in (measured, memory.fixed.graph_bytes)),
            )
        fixed = replace(memory.fixed, graph_bytes=measured)
        planned = replace(memory, fixed=fixed, decoder=f"{memory.decoder}; {checked}" if checked else memory.decoder)
        return Parts(runner, slab, OrderedTables(decoder.tables, accelerator), planned)

    def _decoder(self, slab: Slab, slots: int) -> DeviceDecoder:
        """The base's vectors lie in the slab's reserved bytes."""
        tables = DeltaTables(self._model, self._weights.vectors_V, slab.buffer, 0, slots)
        return DeviceDecoder(self._model, self._weights, tables)

    def _limits(self, config: EngineConfig, max_model_len: int) -> Limits:
        return Limits(
            sequences=config.max_num_seqs,
            rows=config.max_num_batched_tokens,
            blocks=-(-max_model_len // config.block_size),
            block_size=config.block_size,
            vocab=widest_vocabulary(self._model),
        )


def _check_products(device: torch.device) -> str:
    """How signs are multiplied here, for the memory table; empty off CUDA. A slow way is said aloud."""
    if device.type != "cuda":
        return ""
    checked = (self_check(device), ring_check(device))
    for one in checked:
        log.log(logging.INFO if one.ok else logging.WARNING, "%s", one.reason)
    return "; ".join(one.reason for one in checked)


def _graph_reserve(sizes: int, config: EngineConfig) -> int:
    """For the base, what is expected, with and without several rows of a variant, and two families that are not; each
    greedy and not."""
    families = 3 + 2 * max(MOST, len(config.cuda_graph_deltas))
    return GRAPHS_RESERVE + (0 if config.enforce_eager else GRAPH_RESERVE * 2 * families * sizes)
