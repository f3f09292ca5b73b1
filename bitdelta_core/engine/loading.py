"""Putting an engine together: the base's weights, vocabulary and memory, and how its deltas are opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.format import DeltaReader, open_delta
from bitdelta_core.engine.accelerator import accelerator_of
from bitdelta_core.engine.blocks import BlockManager
from bitdelta_core.engine.config import EngineConfig, plan_memory
from bitdelta_core.engine.core import EngineCore
from bitdelta_core.engine.residency import Residency
from bitdelta_core.engine.scheduler import Scheduler
from bitdelta_core.engine.slab import Slab
from bitdelta_core.engine.sources import DeltaFiles, DeltaSource
from bitdelta_core.engine.torch_runner import TorchRunner
from bitdelta_core.engine.variants import Variant
from bitdelta_core.engine.vocabulary import Vocabularies
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.decoder import Decoder, kv_bytes_per_block
from bitdelta_core.models.variant import VariantLayout, VariantWeights


class LoadedBase:
    """What belongs to the base: read once, and never changed."""

    def __init__(self, path: Path, config: EngineConfig, source: DeltaSource | None) -> None:
        checkpoint = Checkpoint(path)
        self.decoder = Decoder.load(checkpoint, device=config.torch_device, dtype=config.torch_dtype)
        self.sha256 = checkpoint.sha256()
        self.shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
        self.files = DeltaFiles(source, retry_s=config.delta_retry_s)
        self.vocabularies = Vocabularies(path, self.files.held)
        block_bytes = kv_bytes_per_block(self.decoder.config, config.block_size, config.torch_dtype)
        self.memory = plan_memory(config, block_bytes=block_bytes)
        self.max_model_len = min(config.max_model_len or self.memory.kv_tokens, self.memory.kv_tokens)
        self.variant = _variant(self.decoder.config, self.vocabularies, None)

    def context_len(self, config_overrides: Mapping[str, Any]) -> int:
        """Longest sequence that a variant with these overrides of config.json may have here."""
        return min(self.decoder.config.with_overrides(config_overrides).context_len, self.max_model_len)

    def open(self, delta: str) -> OpenedVariant:
        """Fetch, validate and plan one delta. Blocks; runs in a loader thread."""
        with self.files.held(delta) as path:
            reader = open_delta(path, expected_base_sha256=self.sha256, base_shapes=self.shapes)
            reader.map_files()
        layout = VariantLayout.plan(reader.config, self.decoder.config, self.memory.dtype, self.memory.device)
        return OpenedVariant(reader, layout, self.decoder, _variant(layout.config, self.vocabularies, delta))


class OpenedVariant:
    """A delta that is here and valid: what it needs in the slab, and how its requests are read and written."""

    def __init__(self, reader: DeltaReader, layout: VariantLayout, decoder: Decoder, variant: Variant) -> None:
        self._reader = reader
        self._layout = layout
        self._decoder = decoder
        self.nbytes = layout.nbytes
        self.variant = variant

    def fill(self, host: torch.Tensor) -> None:
        self._layout.fill(self._reader, host, self._decoder)

    def view(self, extent: torch.Tensor) -> VariantWeights:
        return self._layout.view(extent)


def build_core(base: LoadedBase, config: EngineConfig, wake: Callable[[], None]) -> EngineCore:
    """Take the memory and wire the parts."""
    memory = base.memory
    kv = base.decoder.new_kv_cache(memory.num_kv_blocks, memory.block_size)
    blocks = BlockManager(memory.num_kv_blocks, memory.block_size, prefix_caching=config.enable_prefix_caching)
    return EngineCore(
        base.variant,
        TorchRunner(base.decoder, kv, block_size=memory.block_size, device=memory.device),
        Scheduler(
            blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_variants_per_step=config.max_variants_per_step,
        ),
        Residency(
            Slab(memory.slab_bytes, memory.device),
            base.open,
            wake,
            accelerator=accelerator_of(memory.device),
            fetch_threads=config.fetch_threads,
            load_threads=config.load_threads,
            host_cache_bytes=config.host_cache_bytes,
            retry_s=config.delta_retry_s,
        ),
        max_model_len=base.max_model_len,
        slab_patience_s=config.slab_patience_s,
    )


def _variant(config: ModelConfig, vocabularies: Vocabularies, delta: str | None) -> Variant:
    return Variant(config.context_len, config.vocab_size, vocabularies.get(delta))
