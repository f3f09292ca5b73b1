"""Putting an engine together: the base's weights, vocabulary and memory, and how its deltas are opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.format import open_delta
from bitdelta_core.engine.blocks import BlockManager
from bitdelta_core.engine.config import EngineConfig, plan_memory
from bitdelta_core.engine.core import EngineCore
from bitdelta_core.engine.residency import Residency
from bitdelta_core.engine.runner import Runner
from bitdelta_core.engine.scheduler import Scheduler
from bitdelta_core.engine.slab import Slab
from bitdelta_core.engine.sources import DeltaFiles, DeltaSource
from bitdelta_core.engine.variants import Variant
from bitdelta_core.engine.vocabulary import Vocabularies
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.decoder import Decoder
from bitdelta_core.models.variant import VariantLayout, VariantWeights


class LoadedBase:
    """What belongs to the base: read once, and never changed."""

    def __init__(self, path: Path, config: EngineConfig, source: DeltaSource | None) -> None:
        checkpoint = Checkpoint(path)
        self.sha256 = checkpoint.sha256()
        self.shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
        self.decoder = Decoder.load(path, device=config.torch_device, dtype=config.torch_dtype)
        self.files = DeltaFiles(source, retry_s=config.delta_retry_s)
        self.vocabularies = Vocabularies(path, self.files.locate)
        self.memory = plan_memory(config, block_bytes=_block_bytes(self.decoder.config, config))
        self.variant = _variant(self.decoder.config, self.vocabularies, None)

    def open(self, delta: str) -> OpenedVariant:
        """Fetch, validate and plan one delta. Blocks; runs in a loader thread."""
        reader = open_delta(self.files.locate(delta), expected_base_sha256=self.sha256, base_shapes=self.shapes)
        layout = VariantLayout.plan(reader, self.decoder.config)
        return OpenedVariant(layout, _variant(layout.config, self.vocabularies, delta))


class OpenedVariant:
    """Joins a delta's layout to how its requests are read and written."""

    def __init__(self, layout: VariantLayout, variant: Variant) -> None:
        self._layout = layout
        self.nbytes = layout.nbytes
        self.variant = variant

    def fill(self, host: torch.Tensor) -> None:
        self._layout.fill(host)

    def view(self, extent: torch.Tensor) -> VariantWeights:
        return self._layout.view(extent)


def build_core(base: LoadedBase, config: EngineConfig, wake: Callable[[], None]) -> EngineCore:
    """Take the memory and wire the parts."""
    memory = base.memory
    kv = base.decoder.new_kv_cache(memory.num_kv_blocks, memory.block_size)
    blocks = BlockManager(memory.num_kv_blocks, memory.block_size, prefix_caching=config.enable_prefix_caching)
    return EngineCore(
        base.variant,
        Runner(base.decoder, kv, block_size=memory.block_size, device=memory.device),
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
            fetch_threads=config.fetch_threads,
            load_threads=config.load_threads,
            host_cache_bytes=config.host_cache_bytes,
            retry_s=config.delta_retry_s,
        ),
        max_model_len=min(config.max_model_len or memory.kv_tokens, memory.kv_tokens),
        slab_patience_s=config.slab_patience_s,
    )


def _variant(config: ModelConfig, vocabularies: Vocabularies, delta: str | None) -> Variant:
    return Variant(config.max_position_embeddings, config.vocab_size, vocabularies.get(delta))


def _block_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """K and V of one block in all layers."""
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return per_token * config.block_size * config.torch_dtype.itemsize
