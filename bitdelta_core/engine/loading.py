"""Putting an engine together: the base's weights, vocabulary and memory, and how its deltas are opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.config import DeltaConfig
from bitdelta_core.delta.format import check_fits, open_delta
from bitdelta_core.engine import backend as backends
from bitdelta_core.engine.accelerator import accelerator_of
from bitdelta_core.engine.backend import Backend, TorchBackend
from bitdelta_core.engine.blocks import BlockManager
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.core import EngineCore
from bitdelta_core.engine.delta_loader import DeltaLoader, LoadableDelta, ProcessLoader, ThreadLoader
from bitdelta_core.engine.expected import MOST, Published, UsualDelta
from bitdelta_core.engine.host_buffers import HostBuffer
from bitdelta_core.engine.layouts import Layout, LayoutRule
from bitdelta_core.engine.loader_processes import LoaderProcesses
from bitdelta_core.engine.loader_wire import Setup
from bitdelta_core.engine.memory import plan_memory
from bitdelta_core.engine.residency import Residency
from bitdelta_core.engine.scheduler import Scheduler
from bitdelta_core.engine.sources import DeltaFiles, DeltaSource
from bitdelta_core.engine.startup import Stages
from bitdelta_core.engine.variants import Variant
from bitdelta_core.engine.vocabulary import Vocabularies
from bitdelta_core.errors import BitDeltaError
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.weights import Weights

log = logging.getLogger(__name__)
MOST_LOADERS = 8
"""Processes, which share the codes of a delta. 300 MB of host memory each"""


class LoadedBase:
    """What belongs to the base. Read once; only the memory plan is refined, by `build_core`."""

    def __init__(self, path: Path, config: EngineConfig, source: DeltaSource | None) -> None:
        self.stages = Stages()
        checkpoint = Checkpoint(path)
        self.model = ModelConfig.from_hf(checkpoint.config)
        on_device, why = backends.choose(config, self.model)
        self.accelerator = accelerator_of(config.torch_device)
        self.stages.ended("device")
        self.weights = _read_weights(checkpoint, self.model, config)
        self.stages.ended("weights")
        self.backend = self._backend(on_device, why)
        self.sha256 = checkpoint.sha256()
        self.stages.ended("hash")
        self.shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
        self.files = DeltaFiles(source, retry_s=config.delta_retry_s)
        self.vocabularies = Vocabularies(path, self.files.held)
        self.variant = _variant(self.model, self.vocabularies, None)
        self.stages.ended("tokenizer")
        self.memory = plan_memory(config, self.backend.fixed_memory(config), decoder=self.backend.name)
        self.max_model_len = min(config.max_model_len or self.memory.kv_tokens, self.memory.kv_tokens)
        self.stages.ended("memory plan")
        decoder = "device" if on_device else "torch"
        device = config.torch_device.type
        self.rule = LayoutRule(decoder=decoder, model=self.model, dtype=config.torch_dtype, device=device)
        self.loader = self._loader(checkpoint, config)

    def context_len(self, config_overrides: Mapping[str, Any]) -> int:
        """Longest sequence that a variant with these overrides of config.json may have here."""
        return min(self.model.with_overrides(config_overrides).context_len, self.max_model_len)

    def open(self, delta: str) -> OpenedVariant:
        """Fetch, validate and plan one delta. Blocks; runs in a loader thread."""
        with self.files.held(delta) as path:
            loadable = self.loader.open(path)
        return OpenedVariant(loadable, self, _variant(loadable.layout.config, self.vocabularies, delta))

    def plan(self, path: Path) -> Layout:
        """Of a delta of this base."""
        reader = open_delta(path, expected_base_sha256=self.sha256, base_shapes=self.shapes)
        return self.rule.plan(reader.config)

    def expected(self, config: EngineConfig, published: Published | None) -> list[Layout]:
        """Of variants to prepare for. The torch decoder prepares host buffers alone, and for those that are named."""
        if config.cuda_graph_deltas or self.rule.decoder != "device":
            return [self.plan(Path(path)) for path in config.cuda_graph_deltas]
        found = [] if published is None or config.enforce_eager else published(self.sha256)
        planned = [layout for one in found[:MOST] if (layout := self._planned(one)) is not None]
        return planned or [self.rule.plan(UsualDelta.of(self.model))]

    def release(self) -> None:
        """Give the device's memory back. Nothing can be opened afterwards; the loader has to be closed."""
        del self.weights, self.backend, self.loader
        self.accelerator.release()

    def _planned(self, config: DeltaConfig) -> Layout | None:
        """None, and a word in the log, for what would be refused as well if somebody asked for it."""
        try:
            check_fits(config, self.shapes, "a published delta")
            return self.rule.plan(config)
        except BitDeltaError as error:
            log.warning("nothing is prepared for a published delta: %s", error)
            return None

    def _loader(self, checkpoint: Checkpoint, config: EngineConfig) -> DeltaLoader:
        if not config.loads_in_processes:
            return ThreadLoader(self.rule, self.sha256, self.shapes, self.weights)
        cores = len(os.sched_getaffinity(0))
        setup = Setup(
            base=str(checkpoint.path.resolve()),
            base_fingerprint=checkpoint.fingerprint(),
            base_sha256=self.sha256,
            base_shapes=self.shapes,
            rule=self.rule,
            threads=max(1, min(torch.get_num_threads(), cores // config.load_threads)),
        )
        return ProcessLoader(LoaderProcesses(setup, max(config.load_threads, min(MOST_LOADERS, cores // 2))))

    def _backend(self, on_device: bool, why: str) -> Backend:
        if not on_device:
            return TorchBackend(Decoder(self.model, self.weights), self.accelerator, why)
        from bitdelta_core.engine.device_backend import DeviceBackend

        return DeviceBackend(self.model, self.weights, self.accelerator)


class OpenedVariant:
    """A delta that is here and valid: what it needs in the slab, and how its requests are read and written."""

    def __init__(self, loadable: LoadableDelta, base: LoadedBase, variant: Variant) -> None:
        self._loadable = loadable
        self._backend = base.backend
        self.nbytes = loadable.layout.nbytes
        self.variant = variant

    def fill(self, host: HostBuffer) -> None:
        self._loadable.fill(host)

    def view(self, extent: torch.Tensor) -> Any:
        return self._backend.weights(self._loadable.layout, extent)


def build_core(
    base: LoadedBase, config: EngineConfig, published: Published | None, wake: Callable[[], None]
) -> EngineCore:
    """Take the memory and wire the parts."""
    expected = base.expected(config, published)
    parts = base.backend.build(config, base.memory, base.max_model_len, expected, base.stages)
    base.memory = memory = parts.memory
    blocks = BlockManager(memory.num_kv_blocks, memory.block_size, prefix_caching=config.enable_prefix_caching)
    residency = Residency(
        parts.slab,
        base.open,
        wake,
        accelerator=base.accelerator,
        tables=parts.tables,
        loader=base.loader,
        fetch_threads=config.fetch_threads,
        load_threads=config.load_threads,
        host_cache_bytes=config.host_cache_bytes,
        retry_s=config.delta_retry_s,
    )
    for layout in expected:
        residency.expect(layout.nbytes)
    return EngineCore(
        base.variant,
        parts.runner,
        Scheduler(
            blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_variants_per_step=config.max_variants_per_step,
        ),
        residency,
        max_model_len=base.max_model_len,
        slab_patience_s=config.slab_patience_s,
    )


def _read_weights(checkpoint: Checkpoint, model: ModelConfig, config: EngineConfig) -> Weights:
    device, dtype = config.torch_device, config.torch_dtype
    if device.type == "cpu":
        return Weights.read(checkpoint, model, device=device, dtype=dtype)
    from bitdelta_core.models.device.loading import load_weights

    return load_weights(checkpoint, model, device=device, dtype=dtype)


def _variant(config: ModelConfig, vocabularies: Vocabularies, delta: str | None) -> Variant:
    return Variant(config.context_len, config.vocab_size, vocabularies.get(delta))
