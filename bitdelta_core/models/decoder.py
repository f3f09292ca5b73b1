"""The decoder of Llama, Mistral, Qwen2 and Qwen3 (dense), for rows of several variants of one base in one batch.

Every linear is one product of all rows with the base, then the differences of each variant's own rows. Norms, biases,
embeddings, head and rope are per variant too.

Not covered: training (no gradients are kept), tensor parallelism, mixture of experts.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.models.batch import Batch
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.kv_cache import KVCache, kv_bytes_per_block
from bitdelta_core.models.parameters import FINAL_NORM, LayerVectors, Span
from bitdelta_core.models.step import Step, Vectors
from bitdelta_core.models.weights import Weights
from kernels.delta_linear import delta_linear_
from kernels.embedding import embedding
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.rotary import rotary_
from kernels.segments import BASE

__all__ = ["Decoder", "KVCache", "kv_bytes_per_block"]


class Decoder:
    """The base's weights and the forward pass. Stateless between steps: state is in the KV cache."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self._layers = [_Layer(config, weights, i) for i in range(config.num_layers)]
        self._final_norm = weights.parameters.vectors[FINAL_NORM]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Decoder:
        """Read a checkpoint.

        Args:
            dtype: what to compute in; None: what the checkpoint's embedding is stored in.

        Raises:
            CheckpointError: it cannot be read, or is of an architecture that is not supported.
        """
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
        config = ModelConfig.from_hf(checkpoint.config)
        dtype = dtype or checkpoint.get("model.embed_tokens.weight").dtype
        return cls(config, Weights.read(checkpoint, config, device=torch.device(device), dtype=dtype))

    @property
    def device(self) -> torch.device:
        return self.weights.vectors_V.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.vectors_V.dtype

    @property
    def vectors_V(self) -> torch.Tensor:
        """All of the base's 1-D parameters; see `Parameters.vectors`."""
        return self.weights.vectors_V

    def linear_weight(self, name: str) -> torch.Tensor:
        """One of the base's matrices, by Hugging Face name: a view."""
        return self.weights.linear_weight(name)

    def new_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """Takes `num_blocks * kv_bytes_per_block(config, block_size, dtype)` bytes."""
        return KVCache(self.config, num_blocks, block_size, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """One step: writes the rows' K and V into the cache and gives the logits that are asked for.

        Returns:
            float32 [L, V], V the largest vocabulary among the batch's segments; -inf beyond a row's own vocabulary.
        """
        step = Step.of(batch, self.config, self.vectors_V, kv.block_size)
        x_TK = embedding(batch.token_ids_T, self.weights.targets["embed"], step.deltas_of("embed"), batch.segments)
        for layer, cache in zip(self._layers, kv.layers, strict=True):
            layer.forward_(x_TK, step, cache)
        x_LK = x_TK.index_select(0, batch.logit_rows_L)
        norm = step.vectors.rows(batch.logit_rows_L).get(self._final_norm)
        return self._logits(rms_norm(x_LK, norm, self.config.rms_norm_eps), step)

    def _logits(self, x_LK: torch.Tensor, step: Step) -> torch.Tensor:
        batch, base_size = step.batch, self.config.vocab_size
        sizes = {s.slot: self._vocabulary(batch, s.slot) for s in batch.segments}
        largest, head_VK = max(sizes.values()), self.weights.targets["head"]
        if largest <= base_size:
            y_LV = functional.linear(x_LK, head_VK)
        else:
            y_LV = x_LK.new_zeros((x_LK.shape[0], largest))
            y_LV[:, :base_size] = functional.linear(x_LK, head_VK)
        delta_linear_(y_LV, x_LK, step.deltas_of("head"), batch.logit_segments)
        y_LV = y_LV[:, :largest].float()
        for segment in batch.logit_segments:
            if sizes[segment.slot] < largest:
                y_LV[segment.start : segment.stop, sizes[segment.slot] :] = -torch.inf
        return y_LV

    def _vocabulary(self, batch: Batch, slot: int) -> int:
        return self.config.vocab_size if slot == BASE else batch.variants[slot].config.vocab_size


class _Layer:
    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        self._config = config
        self._eps = config.rms_norm_eps
        self._window = config.windows[index]
        self._names = LayerVectors.of(weights.parameters, index)
        self._weights = {op: weights.targets[f"{index}.{op}"] for op in ("qkv", "o", "gate_up", "down")}
        self._targets = {op: f"{index}.{op}" for op in self._weights}

    def forward_(self, x_TK: torch.Tensor, step: Step, cache_X2GD: torch.Tensor) -> None:
        """Add attention's and the MLP's output to the residual stream x, in place."""
        names, vectors = self._names, step.vectors
        x_TK.add_(self._attention(rms_norm(x_TK, vectors.get(names.input_norm), self._eps), step, cache_X2GD))
        x_TK.add_(self._mlp(rms_norm(x_TK, vectors.get(names.post_norm), self._eps), step))

    def _attention(self, h_TK: torch.Tensor, step: Step, cache_X2GD: torch.Tensor) -> torch.Tensor:
        c, rows = self._config, h_TK.shape[0]
        qkv_TN = self._linear("qkv", h_TK, step, self._names.qkv_bias)
        heads, both = c.num_heads, c.num_heads + c.num_kv_heads
        qk_THD = qkv_TN[:, : both * c.head_dim].view(rows, both, c.head_dim)
        if self._names.q_norm is not None and self._names.k_norm is not None:
            q_norm, k_norm = _per_head(step.vectors, self._names.q_norm), _per_head(step.vectors, self._names.k_norm)
            qk_THD[:, :heads] = rms_norm(qk_THD[:, :heads], q_norm, self._eps)
            qk_THD[:, heads:] = rms_norm(qk_THD[:, heads:], k_norm, self._eps)
        rotary_(qk_THD, step.cos_TD, step.sin_TD)
        cache_X2GD.index_copy_(0, step.batch.kv_slots_T, qkv_TN[:, c.qkv_rows[0] :].view(rows, *c.kv_row))
        out_TC = paged_attention(qk_THD[:, :heads], cache_X2GD, step.attention[self._window])
        return self._linear("o", out_TC, step, self._names.o_bias)

    def _mlp(self, h_TK: torch.Tensor, step: Step) -> torch.Tensor:
        gate, up = self._linear("gate_up", h_TK, step, self._names.gate_up_bias).chunk(2, dim=-1)
        return self._linear("down", functional.silu(gate).mul_(up), step, self._names.down_bias)

    def _linear(self, op: str, x_TK: torch.Tensor, step: Step, bias: Span | None) -> torch.Tensor:
        y_TN = functional.linear(x_TK, self._weights[op])
        delta_linear_(y_TN, x_TK, step.deltas_of(self._targets[op]), step.batch.segments)
        return y_TN if bias is None else y_TN.add_(step.vectors.get(bias))


def _per_head(vectors: Vectors, span: Span) -> torch.Tensor:
    """[D], or [T, 1, D] where rows differ."""
    weight = vectors.get(span)
    return weight if weight.ndim == 1 else weight[:, None]
