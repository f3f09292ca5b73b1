"""The paged KV cache in the layout of the device kernels: for each layer, block and head, rows of K, and rows of V."""

from __future__ import annotations

import torch

from bitdelta_core.models.config import ModelConfig


class DeviceKVCache:
    """`num_blocks` blocks of `kv_bytes_per_block` bytes. Not initialised: only slots that a step wrote are ever read.

    Block 0 is nobody's: a graph's padding rows write there.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        self.blocks_LB2GSD = torch.empty(shape, device=device, dtype=dtype)
        self.layers = self.blocks_LB2GSD.unbind(0)

    @property
    def nbytes(self) -> int:
        return self.blocks_LB2GSD.nbytes
