"""Putting an engine together: the base's weights, vocabulary and memory, and how its deltas are opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.engine import backend as backends
from bitdelta_core.engine.accelerator import accelerator_of
from bitdelta_core.engine.backend import Backend, Layout, TorchBackend
from bitdelta_core.engine.blocks import BlockManager
from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.engine.core import EngineCore
from bitdelta_core.engine.memory import plan_memory
from bitdelta_core.engine.residency import Residency
from bitdelta_core.engine.scheduler import Scheduler
from bitdelta_core.engine.sources import DeltaFiles, DeltaSource
from bitdelta_core.engine.startup import Stages
from bitdelta_core.engine.variants import Variant
from bitdelta_core.engine.vocabulary import Vocabularies
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.weights import Weights


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

    def context_len(self, config_overrides: Mapping[str, Any]) -> int:
        """Longest sequence that a variant with these overrides of config.json may have here."""
        return min(self.model.with_overrides(config_overrides).context_len, self.max_model_len)

    def open(self, delta: str) -> OpenedVariant:
        """Fetch, validate and plan one delta. Blocks; runs in a loader thread."""
        with self.files.held(delta) as path:
            reader = self.read(path)
            reader.map_files()
        layout = self.backend.layout(reader.config)
        return OpenedVariant(reader, layout, self, _variant(layout.config, self.vocabularies, delta))

    def read(self, path: Path) -> DeltaReader:
        """A delta of this base; its header is valid."""
        return open_delta(path, expected_base_sha256=self.sha256, base_shapes=self.shapes)

    def _backend(self, on_device: bool, why: str) -> Backend:
        if not on_device:
            return TorchBackend(Decoder(self.model, self.weights), self.accelerator, why)
        from bitdelta_core.engine.device_backend import DeviceBackend

        return DeviceBackend(self.model, self.weights, self.accelerator)


class OpenedVariant:
    """A delta that is here and valid: what it needs in the slab, and how its requests are read and written."""

    def __init__(self, reader: DeltaReader, layout: Layout, base: LoadedBase, variant: Variant) -> None:
        self._reader = reader
        self._layout = layout
        self._base = base
        self.nbytes = layout.nbytes
        self.variant = variant

    def fill(self, host: torch.Tensor) -> None:
        self._layout.fill(self._reader, host, self._base.weights)

    def view(self, extent: torch.Tensor) -> Any:
        return self._base.backend.weights(self._layout, extent)


def build_core(base: LoadedBase, config: EngineConfig, wake: Callable[[], None]) -> EngineCore:
    """Take the memory and wire the parts."""
    expected = [base.backend.layout(base.read(Path(path)).config) for path in config.cuda_graph_deltas]
    parts = base.backend.build(config, base.memory, base.max_model_len, expected, base.stages)
    base.memory = memory = parts.memory
    blocks = BlockManager(memory.num_kv_blocks, memory.block_size, prefix_caching=config.enable_prefix_caching)
    return EngineCore(
        base.variant,
        parts.runner,
        Scheduler(
            blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_variants_per_step=config.max_variants_per_step,
        ),
        Residency(
            parts.slab,
            base.open,
            wake,
            accelerator=base.accelerator,
            tables=parts.tables,
            fetch_threads=config.fetch_threads,
            load_threads=config.load_threads,
            host_cache_bytes=config.host_cache_bytes,
            retry_s=config.delta_retry_s,
        ),
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
