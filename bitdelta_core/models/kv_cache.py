"""The paged KV cache: one tensor, blocks of `block_size` token slots. Which block is whose is the engine's business."""

from __future__ import annotations

import math

import torch

from bitdelta_core.models.config import ModelConfig


def kv_bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """K and V of one block, all layers."""
    return config.num_layers * block_size * math.prod(config.kv_row) * dtype.itemsize


class KVCache:
    """`num_blocks` blocks. Not initialised: only slots that a batch wrote are ever read."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (config.num_layers, num_blocks * block_size, *config.kv_row)
        self.slots_LX2GD = torch.empty(shape, device=device, dtype=dtype)
        self.layers = self.slots_LX2GD.unbind(0)

    @property
    def nbytes(self) -> int:
        return self.slots_LX2GD.nbytes
