"""The decoder on a GPU: `models.decoder.Decoder` in ten launches a layer, which read all that changes from tables.

- `decode`: one row of each sequence. Nothing but launches, so that a CUDA graph can hold them.
- `prefill`: many rows of few sequences. The host knows the segments and chooses by them.

Between linears pass partial sums, the residual stream in float32, and bit planes of the next one's input.

Not covered: architectures that `supports` names; tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch

from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.activations import Activations, Shapes
from bitdelta_core.models.device.arena import WorkArena
from bitdelta_core.models.device.kinds import ANYTHING, UNSIGNED, StepKinds
from bitdelta_core.models.device.kv_cache import DeviceKVCache
from bitdelta_core.models.device.layout import widest_vocabulary
from bitdelta_core.models.device.passes import DecodePass, Pass, WidePass, WideStep
from bitdelta_core.models.device.tables import DeltaTables
from bitdelta_core.models.device.targets import OPS, misfit, targets_of
from bitdelta_core.models.parameters import FINAL_NORM, LayerVectors, Span
from bitdelta_core.models.weights import Weights
from kernels.delta_linear.device import delta_linear
from kernels.device import Partials, StepRows, Target
from kernels.embedding.device import embed
from kernels.logits.device import logits
from kernels.paged_attention import device as attention
from kernels.rms_norm.device import add_norm
from kernels.rotary.device import Turn, cos_sin
from kernels.silu_mul.device import silu_mul

MAX_ROWS = 256
"""Of a decode step, and with logits in a wide one."""
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where one layer's parts are; all by op."""

    weights: dict[str, torch.Tensor]
    targets: dict[str, Target]
    vectors: LayerVectors
    window: int | None


class DeviceDecoder:
    """The base's weights, the tables, and the working memory of steps. State between steps is in the KV cache."""

    def __init__(self, config: ModelConfig, weights: Weights, tables: DeltaTables) -> None:
        device, dtype = weights.vectors_V.device, weights.vectors_V.dtype
        why_not = self.supports(config, dtype, device)
        assert why_not is None, why_not
        self.config = config
        self.weights = weights
        self.tables = tables
        self._targets = targets_of(config)
        vocab = widest_vocabulary(config)
        self._shapes = Shapes(config=config, targets=self._targets, vocab=vocab, dtype=dtype, device=device)
        self._layers = [self._layer(i) for i in range(config.num_layers)]
        final_norm = weights.parameters.vectors[FINAL_NORM]
        self._final_norm = (final_norm.start, final_norm.stop)
        self.work = torch.empty(0, dtype=torch.uint8, device=device)
        self._workspace: attention.Workspace | None = None

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this decoder cannot compute the model there, or None."""
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
            return f"{dtype} is too slow on GPUs, which take bfloat16 and float16"
        if config.head_dim % 8 or config.head_dim > MAX_HEAD_DIM:
            return f"heads of {config.head_dim} are no multiple of 8 up to {MAX_HEAD_DIM}"
        return misfit(config)

    def new_kv_cache(self, num_blocks: int, block_size: int) -> DeviceKVCache:
        """`block_size`: a power of two, at least 8."""
        device, dtype = self._shapes.device, self._shapes.dtype
        return DeviceKVCache(self.config, num_blocks, block_size, device=device, dtype=dtype)

    def work_bytes(self, decode_rows: int, wide_rows: int) -> int:
        """Device memory that `reserve` takes. Libraries' own workspaces (cuBLAS) come on top."""
        c = self.config
        fixed = attention.workspace_bytes(decode_rows, c.num_heads, c.num_kv_heads, c.head_dim)
        return fixed + self._peak(decode_rows, wide_rows)

    def reserve(self, decode_rows: int, wide_rows: int) -> None:
        """Take the working memory of all steps up to these sizes, once, before a graph is captured.

        Args:
            decode_rows: at most MAX_ROWS.
            wide_rows: 0: there are no wide steps.
        """
        assert decode_rows <= MAX_ROWS, f"{decode_rows} rows in a decode step, at most {MAX_ROWS}"
        c, device = self.config, self._shapes.device
        self.work = torch.empty(self._peak(decode_rows, wide_rows), dtype=torch.uint8, device=device)
        self._workspace = attention.Workspace.empty(decode_rows, c.num_heads, c.num_kv_heads, c.head_dim, device)

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Inside, passes go through layers that launch what no other does, and leave out the rest. For compiling."""
        every = self._layers
        by_window = {layer.window: layer for layer in reversed(every[1:])}
        self._layers = [*every[:1], *reversed(by_window.values())]
        try:
            yield
        finally:
            self._layers = every

    @torch.inference_mode()
    def decode(self, rows: StepRows, sampled_S: torch.Tensor, kv: DeviceKVCache, kinds: StepKinds) -> torch.Tensor:
        """One row of each sequence. Graph-safe: allocates nothing, waits for nothing.

        Args:
            rows: rows, sequences and rows with logits are the same.
            sampled_S: int32, what `source_T` refers to.
            kinds: at least those of the entries that have rows.

        Returns:
            float32 [T, V], V `widest_vocabulary`; -inf beyond a row's own vocabulary; padding's rows hold anything.
            A view of the working memory, which the next step overwrites.
        """
        assert self._workspace is not None, "reserve comes first"
        count = rows.tokens_T.shape[0]
        buffers = self._activations(WorkArena(self.work), count, count, kinds, wide_step=False)
        made = DecodePass(rows=rows, buffers=buffers, deltas=self.tables.deltas, kinds=kinds, workspace=self._workspace)
        self._forward(made, sampled_S, kv)
        self._head(made, None)
        return buffers.logits_LV

    @torch.inference_mode()
    def prefill(self, step: WideStep, sampled_S: torch.Tensor, kv: DeviceKVCache, kinds: StepKinds) -> torch.Tensor:
        """Chunks of prompts.

        Returns:
            As `decode`, but of the rows in `logit_rows_L`: none, or at most MAX_ROWS.
        """
        count, wanted = step.rows.tokens_T.shape[0], step.rows.logit_rows_L.shape[0]
        assert wanted <= MAX_ROWS, f"logits of {wanted} rows, at most {MAX_ROWS} in a step"
        buffers = self._activations(WorkArena(self.work), count, wanted, kinds, wide_step=True)
        assert self._workspace is not None, "reserve comes first"
        deltas, workspace = self.tables.deltas, self._workspace
        made = WidePass(step=step, buffers=buffers, deltas=deltas, kinds=kinds, workspace=workspace)
        self._forward(made, sampled_S, kv)
        if wanted:
            self._head(made, step.rows.logit_rows_L)
        return buffers.logits_LV

    def _forward(self, made: Pass, sampled_S: torch.Tensor, kv: DeviceKVCache) -> None:
        """Up to the last layer's partials. The residual alternates: after attention it is in the second buffer."""
        rows, buffers = made.rows, made.buffers
        weight_VK, target = self.weights.targets["embed"], self._targets["embed"]
        embed(
            rows.tokens_T, rows.source_T, sampled_S, weight_VK, target, made.deltas, rows.entry_T,
            buffers.residuals_TK[0], made.kinds.embed,
        )  # fmt: skip
        cos_sin(rows.positions_T, rows.entry_T, self.tables.rope, buffers.cos_TH, buffers.sin_TH)
        bias: Span | None = None
        for i, layer in enumerate(self._layers):
            self._attention(made, layer, kv.layers[i], bias, first=i == 0)
            self._mlp(made, layer)
            bias = layer.vectors.down_bias

    def _attention(
        self, made: Pass, layer: _Layer, cache_B2GSD: torch.Tensor, last_bias: Span | None, *, first: bool
    ) -> None:
        """`last_bias`: of the down projection of the layer before."""
        c, v, rows, buffers = self.config, layer.vectors, made.rows, made.buffers
        qkv, down, (x_TK, y_TK) = buffers.linears["qkv"], buffers.linears["down"], buffers.residuals_TK
        before, partials, after = (x_TK, None, None) if first else (y_TK, down.out, x_TK)
        self._norm(made, before, partials, v.input_norm, last_bias, "qkv", layer.targets["qkv"], after)
        made.linear("qkv", buffers.hidden_TK, layer.weights["qkv"], layer.targets["qkv"])
        spans = (_pair(v.qkv_bias), _pair(v.q_norm), _pair(v.k_norm))
        turn = Turn(qkv.out, spans, c.rms_norm_eps, buffers.cos_TH, buffers.sin_TH, rows.kv_slots_T)
        made.attend(turn, cache_B2GSD, layer.window, layer.targets["o"])
        made.linear("o", buffers.attended_TC, layer.weights["o"], layer.targets["o"])

    def _mlp(self, made: Pass, layer: _Layer) -> None:
        v, buffers, targets = layer.vectors, made.buffers, layer.targets
        (x_TK, y_TK), attended = buffers.residuals_TK, buffers.linears["o"].out
        self._norm(made, x_TK, attended, v.post_norm, v.o_bias, "gate_up", targets["gate_up"], y_TK)
        made.linear("gate_up", buffers.hidden_TK, layer.weights["gate_up"], targets["gate_up"])
        planes, bias = buffers.linears["down"].planes, _pair(v.gate_up_bias)
        silu_mul(
            buffers.linears["gate_up"].out, made.deltas, bias, made.rows.entry_T, buffers.inner_TI, planes,
            None if planes is None else targets["down"], made.kinds.layers,
        )  # fmt: skip
        made.linear("down", buffers.inner_TI, layer.weights["down"], targets["down"])

    def _norm(
        self, made: Pass, x_TK: torch.Tensor, partials: Partials | None, span: Span, bias: Span | None, op: str,
        target: Target, out_TK: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """The residual plus partials to `out_TK`, and its norm, with planes, to what linear `op` takes."""
        planes = made.buffers.linears[op].planes
        add_norm(
            x_TK, partials, made.deltas, (span.start, span.stop), _pair(bias), made.rows.entry_T,
            self.config.rms_norm_eps, made.buffers.hidden_TK, planes, None if planes is None else target,
            made.kinds.layers, residual_out_TK=out_TK,
        )  # fmt: skip

    def _head(self, made: Pass, rows_L: torch.Tensor | None) -> None:
        """From the last layer's partials to logits. `rows_L`: of these rows only."""
        rows, buffers, head, kinds = made.rows, made.buffers, made.buffers.linears["head"], made.kinds.head
        target, bias = self._targets["head"], self._layers[-1].vectors.down_bias
        add_norm(
            buffers.residuals_TK[1], buffers.linears["down"].out, made.deltas, self._final_norm, _pair(bias),
            rows.entry_T, self.config.rms_norm_eps, buffers.head_hidden_LK, head.planes,
            None if head.planes is None else target, kinds, rows_L=rows_L,
        )  # fmt: skip
        entry_L = rows.entry_T if rows_L is None else rows.entry_T.index_select(0, rows_L)
        delta_linear(
            buffers.head_hidden_LK, head.planes, self.weights.targets["head"], target, made.deltas,
            rows.logit_segments_G4, kinds, head.out, buffers.scratch,
        )  # fmt: skip
        logits(head.out, entry_L, self.tables.vocab_E, buffers.logits_LV)

    def _layer(self, index: int) -> _Layer:
        return _Layer(
            {op: self.weights.targets[f"{index}.{op}"] for op in OPS},
            {op: self._targets[f"{index}.{op}"] for op in OPS},
            LayerVectors.of(self.weights.parameters, index),
            self.config.windows[index],
        )

    def _activations(
        self, arena: WorkArena, rows: int, wanted: int, kinds: StepKinds, *, wide_step: bool
    ) -> Activations:
        return Activations.take(arena, self._shapes, rows, wanted, kinds, wide_step=wide_step)

    def _peak(self, decode_rows: int, wide_rows: int) -> int:
        """Of every size up to these: fewer rows may be cut into more partial sums."""
        sizes = [(rows, rows, False) for rows in range(1, decode_rows + 1)]
        if wide_rows:
            sizes += [(wide_rows, wanted, True) for wanted in range(min(MAX_ROWS, wide_rows) + 1)]
        least = StepKinds()
        pairs = [*product((least, ANYTHING), repeat=2), (UNSIGNED, UNSIGNED)]
        kinds = [StepKinds(a.layers, a.embed, b.head) for a, b in pairs]
        peak = 0
        for (rows, wanted, wide_step), some in product(sizes, kinds):
            arena = WorkArena(None)
            self._activations(arena, rows, wanted, some, wide_step=wide_step)
            peak = max(peak, arena.peak)
        return peak


def _pair(span: Span | None) -> tuple[int, int] | None:
    return None if span is None else (span.start, span.stop)
