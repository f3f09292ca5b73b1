"""Residual addition, RMS norm and bit planes of the next linear's input in one launch, each row with its own weight."""

# Launch options are no parameters of kernels:
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton

from kernels import launches
from kernels.device import DeviceDeltas, Kinds, Partials, Planes, Target
from kernels.planes import padded
from kernels.rms_norm.triton_add_norm import add_norm_kernel
from kernels.rows import check_contiguous, partial_arguments, plane_arguments, span_start


def add_norm(
    residual_TK: torch.Tensor,
    partials: Partials | None,
    deltas: DeviceDeltas,
    span: tuple[int, int],
    bias_span: tuple[int, int] | None,
    entry_T: torch.Tensor,
    eps: float,
    out_TK: torch.Tensor,
    planes: Planes | None,
    target: Target | None,
    kinds: Kinds,
    *,
    residual_out_TK: torch.Tensor | None = None,
    rows_L: torch.Tensor | None = None,
) -> None:
    """out = rms_norm(residual + partials + bias) * weight, as `reference.add_norm` says.

    Args:
        residual_TK: float32 or the compute dtype; the sum is rounded to it.
        partials: what the last linear left; None: nothing is added.
        span, bias_span: elements start:stop of every entry's block of vectors. bias_span: of the last linear.
        out_TK: compute dtype; [L, K] with rows_L.
        planes: of `out` for `target`, which is None exactly when they are.
        residual_out_TK: where the sum goes, None: nowhere. Another tensor than residual_TK if there are planes: a row's
            programs all read the one while they write the other.
        rows_L: only these rows, for the head.
    """
    count, inputs = out_TK.shape
    rows = residual_TK.shape[0]
    assert residual_TK.shape == (rows, inputs)
    assert entry_T.shape == (rows,)
    assert count == rows if rows_L is None else (rows_L.shape == (count,) and residual_out_TK is None)
    assert bias_span is None or partials is not None, "a bias without the product that it belongs to"
    check_contiguous(residual_TK, out_TK, entry_T)
    added, added_constants = partial_arguments(partials, rows, inputs)
    plane, constants, warps = plane_arguments(planes, target, deltas, kinds, count, inputs)
    assert planes is None or residual_out_TK is not residual_TK, "the residual is read while it is written"
    pdl = launches.early(out_TK)
    add_norm_kernel[(count, triton.cdiv(inputs, constants["KS"]) if planes else 1)](
        residual_TK, *added, deltas.slab.view(out_TK.dtype), deltas.vectors_E, entry_T, rows_L, residual_out_TK, out_TK,
        *plane[:5], eps, rows, span_start(span, inputs), span_start(bias_span, inputs), *plane[5:], K=inputs,
        KP=padded(inputs), **added_constants, HAS_BIAS=bias_span is not None, HAS_ROWS=rows_L is not None,
        KEEP=residual_out_TK is not None, **constants, PDL=pdl, num_warps=warps,
        **launches.options(pdl),
    )  # fmt: skip
