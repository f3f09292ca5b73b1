"""Prompts: linears of hundreds to thousands of rows of one variant, and attention of both kinds."""

from __future__ import annotations

from typing import Any

import gpu_timing
import torch
from kernel_worlds import Parts, Rows, bulk, rows_of, targets_of
from linear_cases import LIMIT, weights_of
from synthetic import Shape

from kernels.delta_linear import gluon_product, wide
from kernels.device import DeviceDeltas, Kinds, Target
from kernels.paged_attention import device as paged

PREFILLS = ((128, 1), (512, 1), (2048, 1), (512, 16), (2048, 16))
"""(rows, variants)"""
CONTEXTS = (512, 1024, 4096)
BLOCK = 16
SLICE = 2**24
"""Bytes of W + D at a time"""
BF16_LIMIT = 1.2e-2
"""Of merged weights and 16-bit outputs."""


def prefill(session: Any, name: str, shape: Shape) -> None:
    """Every way of `wide` against the base product alone."""
    for op in ("qkv", "gate_up"):
        target = targets_of(shape)[op]
        weights = weights_of(target, session.dtype)
        made = bulk(target, Parts(planes=1), 16, session.dtype)
        for count, variants in ((48, 2),) if session.dry else PREFILLS:
            if session.clock.spent():
                return
            rows = rows_of([i * variants // count + 1 for i in range(count)])
            case = {"kernel": "prefill", "model": name, "op": op, "rows": count, "variants": variants}
            _time_prefill(session, case, target, weights, made, rows)


def _time_prefill(session: Any, case: dict, target: Target, weights: list, made: Any, rows: Rows) -> None:
    device, dtype, count = gpu_timing.device(), made.dtype, rows.entry_T.shape[0]
    x_TK = torch.randn(count, target.inputs, device=device).to(dtype)
    tiles = torch.tensor(wide.row_tiles(rows.segments), dtype=torch.int32, device=device)
    kinds = made.parts.kinds()
    workspace = torch.empty(wide.workspace_bytes(target, count, kinds, dtype), dtype=torch.uint8, device=device)
    out_TN = torch.empty(count, target.outputs, dtype=dtype, device=device)

    def call(weight: torch.Tensor, way: wide.Way | None) -> None:
        wide.prefill_linear(x_TK, weight, target, made.deltas, tiles, rows.segments, kinds, out_TN, workspace, way=way)

    entry, start, stop = rows.segments[0]
    expected = x_TK[start:stop].double() @ (weights[0].double() + made.matrix(entry)).T
    base = gpu_timing.graph_us([lambda w=w: torch.mm(x_TK, w.T, out=out_TN) for w in weights])
    operations = 2 * count * target.outputs * target.inputs
    for name, way in _ways(target, gluon_product.supports(x_TK, weights[0], target, kinds)).items():
        out_TN.fill_(float("nan"))
        call(weights[0], way)
        error = gpu_timing.relative_error(out_TN[start:stop], expected)
        label = {**case, "impl": name}
        if session.report.check(str(label), error, BF16_LIMIT):
            us = gpu_timing.graph_us([lambda w=w, way=way: call(w, way) for w in weights])
            nbytes = weights[0].nbytes + len(rows.segments) * made.bytes_per_entry
            label |= {"tflops": round(operations / us / 1e6, 1), "of_base": round(us / base, 3)}
            session.report.row(label, us, nbytes=nbytes, peers_us={"cublas base": base})


def _ways(target: Target, specialised: bool) -> dict[str, wide.Way | None]:
    """What is chosen, and every other way by itself."""
    whole = target.outputs * target.inputs * 2
    found: dict[str, wide.Way | None] = {"chosen": None, "merge": wide.Way("merge", slice_bytes=whole)}
    for overlap in (False, True) if gpu_timing.device().type == "cuda" else (False,):
        name = f"merge, slices{', overlapped' if overlap else ''}"
        found[name] = wide.Way("merge", slice_bytes=SLICE, overlap=overlap)
    found |= {"fused": wide.Way("fused"), "split": wide.Way("split")}
    return found | ({"specialised": wide.Way("specialised")} if specialised else {})


def attention(session: Any, name: str, shape: Shape) -> None:
    """Decode at several contexts, and chunks of prompts, against torch's own attention on contiguous K and V."""
    for context in (70,) if session.dry else CONTEXTS:
        for rows in (2,) if session.dry else (1, 16, 64):
            if session.clock.spent():
                return
            _time_decode(session, {"kernel": "attention decode", "model": name}, shape, rows, context)
    for chunk, context in ((40, 70),) if session.dry else ((512, 512), (2048, 2048), (512, 4096)):
        if not session.clock.spent():
            _time_chunk(session, {"kernel": "attention prefill", "model": name}, shape, chunk, context)


def _cache(shape: Shape, rows: int, context: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache of which every sequence has its own shuffled blocks, and their table."""
    device, blocks = gpu_timing.device(), -(-context // BLOCK)
    order = torch.randperm(rows * blocks, device=device) + 1
    head_dim = shape.hidden // shape.heads
    cache = torch.randn(rows * blocks + 1, 2, shape.kv_heads, BLOCK, head_dim, device=device).to(dtype)
    return cache, order.view(rows, blocks).int().contiguous()


def _gathered(cache: torch.Tensor, table_M: torch.Tensor, context: int) -> torch.Tensor:
    """[2, kv_heads, context, D] of one sequence."""
    return cache[table_M.long()].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]


def _time_decode(session: Any, case: dict, shape: Shape, rows: int, context: int) -> None:
    device, dtype, head_dim = gpu_timing.device(), session.dtype, shape.hidden // shape.heads
    nbytes = rows * context * 2 * shape.kv_heads * head_dim * dtype.itemsize
    layers = [_cache(shape, rows, context, dtype) for _ in range(gpu_timing.copies(nbytes))]
    q_THD = torch.randn(rows, shape.heads, head_dim, device=device).to(dtype)
    lens = torch.full((rows,), context, dtype=torch.int32, device=device)
    out = torch.full((rows, shape.hidden), float("nan"), dtype=dtype, device=device)
    workspace = paged.Workspace.empty(rows, shape.heads, shape.kv_heads, head_dim, device)
    entry_T = torch.zeros(rows, dtype=torch.int32, device=device)
    nothing = DeviceDeltas(torch.empty(0, dtype=torch.uint8, device=device), entry_T.view(rows, 1, 1), entry_T)

    def call(cache: torch.Tensor, tables: torch.Tensor) -> None:
        paged.decode(q_THD, cache, tables, lens, None, out, None, None, nothing, entry_T, Kinds(), workspace)

    cache, tables = layers[0]
    call(cache, tables)
    k, v = _gathered(cache, tables[0], context)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q_THD[0][None, :, None].double(), k[None].double(), v[None].double(), enable_gqa=True
    )
    label = {**case, "rows": rows, "context": context}
    if not session.report.check(str(label), gpu_timing.relative_error(out[0], expected.flatten()), LIMIT):
        return
    peers = {}
    if rows * context <= 2**17:
        whole = torch.stack([_gathered(cache, t, context) for t in tables]).transpose(0, 1).contiguous()
        peers["torch sdpa, contiguous"] = gpu_timing.stream_us(
            lambda: torch.nn.functional.scaled_dot_product_attention(
                q_THD[:, :, None], whole[0], whole[1], enable_gqa=True
            )
        )
    us = gpu_timing.graph_us([lambda layer=layer: call(*layer) for layer in layers])
    session.report.row(label, us, nbytes=nbytes, peers_us=peers)


def _time_chunk(session: Any, case: dict, shape: Shape, chunk: int, context: int) -> None:
    device, dtype, head_dim = gpu_timing.device(), session.dtype, shape.hidden // shape.heads
    cache, tables = _cache(shape, 1, context, dtype)
    q_THD = torch.randn(chunk, shape.heads, head_dim, device=device).to(dtype)
    lens = torch.tensor([context], dtype=torch.int32, device=device)
    starts = torch.tensor([0, chunk], dtype=torch.int32, device=device)
    out = torch.full((chunk, shape.hidden), float("nan"), dtype=dtype, device=device)
    call = lambda: paged.prefill(q_THD, cache, starts, lens, tables, None, out, chunk)  # noqa: E731
    call()
    k, v = _gathered(cache, tables[0], context)
    mask = torch.ones(chunk, context, dtype=torch.bool, device=device).tril(context - chunk)
    q = q_THD.transpose(0, 1)[None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k[None].float(), v[None].float(), attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    label = {**case, "rows": chunk, "context": context}
    if not session.report.check(str(label), gpu_timing.relative_error(out, expected.flatten(1)), BF16_LIMIT):
        return
    causal = chunk == context
    sdpa = lambda: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
        q, k[None], v[None], attn_mask=None if causal else mask, is_causal=causal, enable_gqa=True
    )
    us = gpu_timing.graph_us([call])
    operations = 4 * shape.heads * head_dim * chunk * (context - chunk / 2)
    nbytes = context * 2 * shape.kv_heads * head_dim * dtype.itemsize
    label |= {"tflops": round(operations / us / 1e6, 1)}
    session.report.row(label, us, nbytes=nbytes, peers_us={"torch sdpa": gpu_timing.stream_us(sdpa)})
