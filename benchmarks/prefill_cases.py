"""Prompts: linears of hundreds to thousands of rows of one variant, and attention of both kinds."""

from __future__ import annotations

from itertools import product
from typing import Any

import gpu_timing
import torch
from attention_cases import AttentionCase, AttentionRun
from kernel_worlds import Parts, Rows, bulk, rows_of, targets_of
from linear_cases import weights_of
from synthetic import Shape

from kernels.delta_linear import gluon_product, wide
from kernels.delta_linear.row_tiles import SIZES, row_tiles
from kernels.device import Target

PREFILLS = ((64, 1), (128, 1), (512, 1), (2048, 1), (512, 16), (1024, 16), (2048, 16))
"""(rows, variants)"""
CONTEXTS = (512, 1024, 4096)
CHUNKS = ((512, 512), (2048, 2048), (512, 4096))
"""(rows, context)"""
SLICE = 2**24
"""Bytes of W + D at a time"""
BF16_LIMIT = 1.2e-2
"""Of merged weights, and of what is rounded between launches."""


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
    tiles = torch.tensor(row_tiles(rows.segments), dtype=torch.int32, device=device)
    kinds = made.parts.kinds()
    workspace = torch.empty(wide.workspace_bytes(target, count, kinds, dtype), dtype=torch.uint8, device=device)
    out_TN = torch.empty(count, target.outputs, dtype=dtype, device=device)

    def call(weight: torch.Tensor, way: wide.Way | None) -> None:
        wide.prefill_linear(x_TK, weight, target, made.deltas, tiles, rows.segments, kinds, out_TN, workspace, way=way)

    entry, start, stop = rows.segments[0]
    expected = x_TK[start:stop].double() @ (weights[0].double() + made.matrix(entry)).T
    operations = 2 * count * target.outputs * target.inputs
    for name, way in _ways(target, gluon_product.supports(x_TK, weights[0], target, kinds)).items():
        out_TN.fill_(float("nan"))
        call(weights[0], way)
        error = gpu_timing.relative_error(out_TN[start:stop], expected)
        label = {**case, "impl": name}
        if session.report.check(str(label), error, BF16_LIMIT):
            # Large products heat the chip, which then slows down: the peer anew each time.
            base = gpu_timing.graph_us([lambda w=w: torch.mm(x_TK, w.T, out=out_TN) for w in weights])
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
    sizes = {f"specialised, {rows}": wide.Way("specialised", rows=rows) for rows in SIZES}
    return found | (sizes if specialised else {})


def attention(session: Any, name: str, shape: Shape) -> None:
    """Decode at several contexts, and chunks of prompts, against torch's own attention on contiguous K and V."""
    decodes = ((2, 70),) if session.dry else tuple(product((1, 16, 64), CONTEXTS))
    chunks = ((40, 70),) if session.dry else CHUNKS
    for kind, sizes in (("decode", decodes), ("prefill", chunks)):
        for rows, context in sizes:
            if session.clock.spent():
                return
            _time_attention(session, AttentionCase(name, kind, rows, context, session.dtype))


def _time_attention(session: Any, case: AttentionCase) -> None:
    run, label = AttentionRun(case), case.label()
    if not session.report.check(str(label), run.error(), case.limit):
        return
    us = gpu_timing.graph_us(run.calls()) - run.before_us()
    if case.kind == "prefill":
        label |= {"tflops": round(case.operations / us / 1e6, 1)}
    session.report.row(label, us, nbytes=case.nbytes, peers_us=run.peers_us())
