"""Attention of one layer as the benchmarks time and check it: decode of some rows, or a chunk of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import gpu_timing
import torch
import triton
import triton.language as tl
from gpu_timing import Call
from synthetic import SHAPES
from torch.nn.functional import scaled_dot_product_attention
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import launches
from kernels.device import DeviceDeltas, Kinds, Partials
from kernels.paged_attention import choice
from kernels.paged_attention.device import Workspace, decode, prefill
from kernels.rotary.device import Turn

BLOCK = 16
LIMITS = {"decode": 6e-3, "prefill": 1.2e-2}
"""Of the relative error of 16-bit outputs; prefill's probabilities are rounded to 16 bits too."""
PEER_TOKENS = 2**17
"""Of all rows together, of which torch's attention gets contiguous K and V of its own"""
Config = choice.DecodeConfig | choice.PrefillConfig


@dataclass(frozen=True)
class AttentionCase:
    """Of a shape's heads."""

    shape: str
    kind: Literal["decode", "prefill"]
    rows: int
    context: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def heads(self) -> tuple[int, int, int]:
        """K/V heads, query heads of each, and their size."""
        shape = SHAPES[self.shape]
        return shape.kv_heads, shape.heads // shape.kv_heads, shape.hidden // shape.heads

    @property
    def sequences(self) -> int:
        return self.rows if self.kind == "decode" else 1

    @property
    def nbytes(self) -> int:
        """What must be read: K and V once."""
        kv_heads, _, dim = self.heads
        return self.sequences * self.context * 2 * kv_heads * dim * self.dtype.itemsize

    @property
    def limit(self) -> float:
        return LIMITS[self.kind]

    @property
    def operations(self) -> float:
        """Of a chunk."""
        kv_heads, group, dim = self.heads
        return 4 * kv_heads * group * dim * self.rows * (self.context - self.rows / 2)

    def label(self) -> dict[str, Any]:
        return {"kernel": f"attention {self.kind}", "model": self.shape, "rows": self.rows, "context": self.context}

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "dtype"}

    def candidates(self) -> Sequence[Config]:
        kv_heads, group, dim = self.heads
        chip = choice.Chip.of(gpu_timing.device())
        if self.kind == "decode":
            return choice.decode_candidates(self.rows, kv_heads, group, dim, chip)
        return choice.prefill_candidates(self.rows, group, dim, chip)

    def key(self) -> str:
        kv_heads, group, dim = self.heads
        if self.kind == "decode":
            return choice.decode_key(self.rows, kv_heads, group, dim)
        return choice.prefill_key(self.rows, group, dim)


@triton.jit
def _linear_kernel(WEIGHT, OUT, BLOCK: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
    first = tl.program_id(0).to(tl.int64) * UNROLL
    total = tl.zeros((BLOCK,), tl.int32)
    for u in tl.static_range(UNROLL):
        total = total ^ tl.load(WEIGHT + (first + u) * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    folded = tl.sum(total, 0)
    if folded == 123456789:  # keeps the loads alive
        tl.store(OUT, folded)
    if PDL:
        gdc_launch_dependents()


class LinearBefore:
    """Reads as many bytes as a linear and lets the next kernel start when it ends, as linears do: what decode attention
    follows in a step. Back to back, attention would hide its start behind itself."""

    BYTES, BLOCK, UNROLL = 64 << 20, 2048, 4

    def __init__(self, device: torch.device) -> None:
        self._weights = torch.ones(4, self.BYTES // 4, dtype=torch.int32, device=device)
        self._out, self._turn = torch.zeros(1, dtype=torch.int32, device=device), 0

    def __call__(self) -> None:
        self._turn = (self._turn + 1) % len(self._weights)
        pdl = launches.early(self._out)
        _linear_kernel[(self.BYTES // (4 * self.BLOCK * self.UNROLL),)](
            self._weights[self._turn], self._out, self.BLOCK, self.UNROLL, PDL=pdl, **launches.options(pdl)
        )


class AttentionRun:
    """A case's tensors: every sequence has its own shuffled blocks, and there are as many layers as keep the cache that
    is read out of the GPU's own. No config: what the kernels choose.

    Decode is timed as a step has it: from what the linear left of q, k and v, behind that linear. What that takes alone
    is to be subtracted, `before_us`.
    """

    def __init__(self, case: AttentionCase) -> None:
        self.case, device = case, gpu_timing.device()
        kv_heads, group, dim = case.heads
        sequences, blocks = case.sequences, -(-case.context // BLOCK)
        size = (sequences * blocks + 1, 2, kv_heads, BLOCK, dim)
        count = gpu_timing.copies(case.nbytes)
        self._layers = [torch.randn(size, device=device, dtype=case.dtype) for _ in range(count)]
        order = torch.randperm(sequences * blocks, device=device) + 1
        self._tables = order.view(sequences, blocks).int().contiguous()
        self._q_THD = torch.randn(case.rows, kv_heads * group, dim, device=device, dtype=case.dtype)
        self._contexts = torch.full((sequences,), case.context, dtype=torch.int32, device=device)
        self._starts = torch.tensor([0, case.rows], dtype=torch.int32, device=device)
        self._out = torch.empty_like(self._q_THD).flatten(1)
        self._workspace = Workspace.empty(max(64, sequences), kv_heads * group, kv_heads, dim, device)
        self._entries = torch.zeros(case.rows, dtype=torch.int32, device=device)
        self._nothing = DeviceDeltas(self._out, self._entries, self._entries)
        self._linear = LinearBefore(device) if case.kind == "decode" and device.type == "cuda" else None
        self._turn = self._newest() if case.kind == "decode" else None
        self._expected = self._reference()

    def before_us(self) -> float:
        return gpu_timing.graph_us([self._linear]) if self._linear else 0.0

    def _newest(self) -> Turn:
        """That of which q is made, and the last key and value of each sequence: not turned, so that they are known."""
        rows, _, dim = self._q_THD.shape
        kv_heads, device, dtype = self.case.heads[0], self._out.device, self.case.dtype
        kv_T2GD = torch.randn(rows, 2, kv_heads, dim, device=device, dtype=dtype)
        last, within = divmod(self.case.context - 1, BLOCK)
        for cache in self._layers:
            cache[self._tables[:, last].long(), :, :, within] = kv_T2GD
        made = torch.cat((self._q_THD.flatten(1), kv_T2GD.flatten(1)), 1).float()
        angles = torch.zeros(rows, dim // 2, device=device)
        slots = (self._tables[:, last] * BLOCK + within).int().contiguous()
        partials = Partials(torch.stack((made, torch.zeros_like(made))), None)
        return Turn(partials, (None, None, None), 1e-5, angles.cos(), angles, slots)

    def calls(self, config: Any = None) -> list[Call]:
        return [lambda cache=cache: self._behind(cache, config) for cache in self._layers]

    def _behind(self, cache: torch.Tensor, config: Any) -> None:
        if self._linear is not None:
            self._linear()
        self._call(cache, config)

    def error(self, config: Any = None) -> float:
        """Of the first sequence, against float64."""
        self._out.fill_(float("nan"))
        self._call(self._layers[0], config)
        return gpu_timing.relative_error(self._out[: self._expected.shape[0]], self._expected)

    def peers_us(self) -> dict[str, float]:
        """torch's own attention of the same rows, on contiguous K and V; none where those would be too large."""
        if self.case.kind == "prefill":
            return {"torch sdpa": gpu_timing.stream_us(self._torch_chunk())}
        if self.case.sequences * self.case.context > PEER_TOKENS:
            return {}
        k, v = (torch.stack(one) for one in zip(*map(self._gathered, self._tables), strict=True))
        q = self._q_THD[:, :, None]
        call = lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
        return {"torch sdpa, contiguous": gpu_timing.stream_us(call)}

    def _torch_chunk(self) -> Call:
        k, v = self._gathered(self._tables[0])
        q, causal = self._q_THD.transpose(0, 1)[None], self.case.rows == self.case.context
        mask = None if causal else self._mask()
        return lambda: scaled_dot_product_attention(
            q, k[None], v[None], attn_mask=mask, is_causal=causal, enable_gqa=True
        )

    def _call(self, cache: torch.Tensor, config: Any) -> None:
        if self.case.kind == "decode":
            decode(
                self._q_THD, cache, self._tables, self._contexts, None, self._out, None, None, self._nothing,
                self._entries, Kinds(), self._workspace, turn=self._turn, config=config,
            )  # fmt: skip
        else:
            prefill(
                self._q_THD, cache, self._starts, self._contexts, self._tables, None, self._out, self.case.rows,
                workspace=self._workspace, config=config,
            )  # fmt: skip

    def _gathered(self, table_M: torch.Tensor) -> torch.Tensor:
        """[2, kv_heads, context, D] of one sequence."""
        return self._layers[0][table_M.long()].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.case.context]

    def _mask(self) -> torch.Tensor:
        rows = 1 if self.case.kind == "decode" else self.case.rows
        allowed = torch.ones(rows, self.case.context, dtype=torch.bool, device=self._out.device)
        return allowed.tril(self.case.context - rows)

    def _reference(self) -> torch.Tensor:
        """[rows, H * D] of the first sequence; float64, float32 where that takes long."""
        mask = self._mask()
        wide = torch.float64 if mask.shape[0] == 1 else torch.float32
        k, v = self._gathered(self._tables[0]).to(wide)[:, None]
        q = self._q_THD[: mask.shape[0]].transpose(0, 1)[None].to(wide)
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return found[0].transpose(0, 1).flatten(1)
