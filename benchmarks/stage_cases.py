"""What stands between the linears of a decode step, and the sampler at its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gpu_timing
import torch
from gpu_timing import Call
from kernel_worlds import Parts, bulk, rows_of, targets_of
from synthetic import Shape

from kernels.device import DeviceDeltas, Kinds, Partials, Planes, Target
from kernels.embedding.device import embed
from kernels.planes import prepare_planes, values
from kernels.rms_norm.device import add_norm
from kernels.sampling import sample
from kernels.sampling.rows import RowValues, Sampled, SamplingRows
from kernels.sampling.workspace import Workspace
from kernels.silu_mul.device import silu_mul

LIMIT = 6e-3
SIGNS = Kinds(signs=True)
SPLIT = 2
"""Partials that a linear before leaves"""


def stages(session: Any, name: str, shape: Shape) -> None:
    """Each with the planes for the linear that follows, as a step with sign deltas has them, and without."""
    for rows in (2,) if session.dry else (1, 16, 64):
        for kinds in (Kinds(), SIGNS):
            for make in (_norm, _silu):
                if session.clock.spent():
                    return
                call, found, expected, nbytes, kernel = make(shape, rows, kinds, session.dtype)
                label = {"kernel": kernel, "model": name, "rows": rows, "planes": kinds.signs}
                call()
                if session.report.check(str(label), gpu_timing.relative_error(found, expected), LIMIT):
                    session.report.row(label, gpu_timing.graph_us([call]), nbytes=nbytes)
        _time_planes(session, name, shape, rows)
        _time_embedding(session, name, shape, rows)


def _with_vectors(target: Target, size: int, rows: int, dtype: torch.dtype) -> tuple[DeviceDeltas, torch.Tensor]:
    """Sixteen variants whose vectors all lie at the start of the slab."""
    made = bulk(target, Parts(planes=1), 16, dtype)
    vectors = torch.ones(size, dtype=dtype, device=gpu_timing.device())
    room = -(-vectors.nbytes // 256) * 256
    padded = torch.zeros(room, dtype=torch.uint8, device=vectors.device)
    padded[: vectors.nbytes] = vectors.view(torch.uint8)
    entry_T = rows_of([i % 16 + 1 for i in range(rows)]).entry_T
    return DeviceDeltas(padded, made.deltas.table_EJF, torch.zeros_like(made.deltas.vectors_E)), entry_T


def _norm(shape: Shape, rows: int, kinds: Kinds, dtype: torch.dtype) -> tuple[Call, Any, Any, int, str]:
    target, device, k = targets_of(shape)["qkv"], gpu_timing.device(), shape.hidden
    deltas, entry_T = _with_vectors(target, k, rows, dtype)
    residual = torch.randn(rows, k, device=device).to(dtype)
    base, delta = torch.randn(SPLIT, rows, k, device=device), torch.randn(rows, k, device=device)
    partials = Partials(base, delta if kinds.signs else None)
    out, after = torch.empty_like(residual), torch.empty_like(residual)
    planes = Planes.empty(kinds.sets(target), rows, k, device) if kinds.signs else None
    total = residual.double() + base.double().sum(0) + (delta.double() if kinds.signs else 0)
    expected = total * torch.rsqrt((total**2).mean(1, keepdim=True) + 1e-5)

    def call() -> None:
        add_norm(
            residual,
            partials,
            deltas,
            (0, k),
            None,
            entry_T,
            1e-5,
            out,
            planes,
            target if planes else None,
            kinds,
            residual_out_TK=after,
        )

    nbytes = base.nbytes + delta.nbytes * kinds.signs + 3 * residual.nbytes
    return call, out, expected, nbytes + (planes.words_CTW.nbytes if planes else 0), "add_norm"


def _silu(shape: Shape, rows: int, kinds: Kinds, dtype: torch.dtype) -> tuple[Call, Any, Any, int, str]:
    target, device, inner = targets_of(shape)["down"], gpu_timing.device(), shape.inner
    deltas, entry_T = _with_vectors(target, 8, rows, dtype)
    base, delta = torch.randn(1, rows, 2 * inner, device=device), torch.randn(rows, 2 * inner, device=device)
    partials = Partials(base, delta if kinds.signs else None)
    out = torch.empty(rows, inner, dtype=dtype, device=device)
    planes = Planes.empty(kinds.sets(target), rows, inner, device) if kinds.signs else None
    both = base[0].double() + (delta.double() if kinds.signs else 0)
    expected = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]

    def call() -> None:
        silu_mul(partials, deltas, None, entry_T, out, planes, target if planes else None, kinds)

    nbytes = base.nbytes + delta.nbytes * kinds.signs + out.nbytes
    return call, out, expected, nbytes + (planes.words_CTW.nbytes if planes else 0), "silu_mul"


def _time_planes(session: Any, name: str, shape: Shape, rows: int) -> None:
    target = targets_of(shape)["down"]
    deltas, entry_T = _with_vectors(target, 8, rows, session.dtype)
    x_TK = torch.randn(rows, target.inputs, device=entry_T.device).to(session.dtype)
    planes = Planes.empty(1, rows, target.inputs, entry_T.device)
    call = lambda: prepare_planes(x_TK, planes, target, deltas, entry_T, SIGNS)  # noqa: E731
    call()
    label = {"kernel": "planes", "model": name, "rows": rows}
    if session.report.check(str(label), gpu_timing.relative_error(values(planes, target.inputs)[0], x_TK), 1e-3):
        session.report.row(label, gpu_timing.graph_us([call]), nbytes=x_TK.nbytes + planes.words_CTW.nbytes)


def _time_embedding(session: Any, name: str, shape: Shape, rows: int) -> None:
    target, device = targets_of(shape)["head"], gpu_timing.device()
    made = bulk(target, Parts(planes=1), 2, session.dtype)
    weight = torch.randn(target.outputs, target.inputs, device=device).to(session.dtype)
    tokens = torch.randint(0, target.outputs, (rows,), dtype=torch.int32, device=device)
    entry_T = rows_of([i % 2 + 1 for i in range(rows)]).entry_T
    source, out = torch.full_like(tokens, -1), torch.empty(rows, target.inputs, dtype=session.dtype, device=device)
    call = lambda: embed(tokens, source, tokens, weight, target, made.deltas, entry_T, out, SIGNS)  # noqa: E731
    call()
    expected = weight[tokens[0].long()].double() + made.matrix(1)[tokens[0].long()]
    label = {"kernel": "embed", "model": name, "rows": rows}
    if session.report.check(str(label), gpu_timing.relative_error(out[0], expected), LIMIT):
        nbytes = rows * (2 * out[0].nbytes + target.inputs // 8)
        session.report.row(label, gpu_timing.graph_us([call]), nbytes=nbytes)


SAMPLED = {
    "greedy": RowValues(vocab=1, temperature=0.0),
    "temperature": RowValues(vocab=1, temperature=0.8),
    "top-k 40, top-p 0.9": RowValues(vocab=1, temperature=0.8, top_k=40, top_p=0.9),
}


def sampling(session: Any, name: str, shape: Shape) -> None:
    """A row per sequence over the whole vocabulary; torch's own way beside it."""
    for rows in (2,) if session.dry else (1, 16, 64):
        logits = torch.randn(rows, shape.vocabulary, device=gpu_timing.device()) * 3
        for way in SAMPLED:
            if session.clock.spent():
                return
            _time_sampling(session, {"kernel": "sampling", "model": name, "rows": rows, "way": way}, logits)


def _time_sampling(session: Any, case: dict[str, Any], logits: torch.Tensor) -> None:
    (rows, vocab), device, line = logits.shape, logits.device, SAMPLED[case["way"]]
    packed = b"".join(_line(line, vocab, i) for i in range(rows))
    fields = SamplingRows(torch.frombuffer(bytearray(packed), dtype=torch.int32).view(rows, -1).to(device))
    workspace = Workspace.empty(rows, vocab, device)
    found, expected = Sampled.empty(rows, device), Sampled.empty(rows, device)
    call = lambda: sample(logits, fields, None, found, workspace, line.wants, impl="triton")  # noqa: E731
    call()
    sample(logits, fields, None, expected, None, line.wants, impl="reference")
    wrong = float((found.token_S != expected.token_S).float().mean())
    if session.report.check(str(case), wrong, 0.0):
        peers = {"torch": gpu_timing.stream_us(lambda: _torch_sample(logits, case["way"]))}
        session.report.row(case, gpu_timing.graph_us([call]), nbytes=logits.nbytes, peers_us=peers)


def _line(line: RowValues, vocab: int, seed: int) -> bytes:
    return replace(line, vocab=vocab).pack((seed * 2654435761) % 2**31)


def _torch_sample(logits: torch.Tensor, way: str) -> torch.Tensor:
    if way == "greedy":
        return logits.argmax(1)
    probs = torch.softmax(logits / 0.8, 1)
    if way == "temperature":
        return torch.multinomial(probs, 1)
    ordered, index = probs.sort(1, descending=True)
    keep = (ordered.cumsum(1) - ordered < 0.9) & (torch.arange(probs.shape[1], device=probs.device) < 40)
    return index.gather(1, torch.multinomial(ordered * keep, 1))
