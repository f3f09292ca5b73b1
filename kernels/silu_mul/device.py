"""SiLU of gate, times up; bit planes of the product for the down projection in a second launch."""

# Launch options are no parameters of kernels:
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton

from kernels import launches
from kernels.device import DeviceDeltas, Kinds, Partials, Planes, Target
from kernels.planes import FEW_ROWS, padded, prepare_planes
from kernels.rows import check_contiguous, partial_arguments, span_start
from kernels.silu_mul.triton_silu_mul import silu_mul_kernel

_WIDTH, _FEW_WIDTH = 1024, 256
"""Columns of each program, of many and of few rows"""
_WARPS = 4


def silu_mul(
    partials: Partials,
    deltas: DeviceDeltas,
    bias_span: tuple[int, int] | None,
    entry_T: torch.Tensor,
    out_TI: torch.Tensor,
    planes: Planes | None,
    target_down: Target | None,
    kinds: Kinds,
) -> None:
    """out = silu(gate) * up of gate_up = partials + bias, as `reference.silu_mul` says.

    Args:
        partials: [.., T, 2 I], gate before up.
        bias_span: gate's and up's biases, neighbours, in every entry's block of vectors.
        out_TI: compute dtype.
        planes: of `out` for `target_down`, which is None exactly when they are.
    """
    rows, inputs = out_TI.shape
    assert entry_T.shape == (rows,)
    check_contiguous(out_TI, entry_T)
    added, added_constants = partial_arguments(partials, rows, 2 * inputs)
    width, pdl = min(padded(inputs), _FEW_WIDTH if rows <= FEW_ROWS else _WIDTH), launches.early(out_TI)
    silu_mul_kernel[(rows, triton.cdiv(inputs, width))](
        *added, deltas.slab.view(out_TI.dtype), deltas.vectors_E, entry_T, out_TI, rows,
        span_start(bias_span, 2 * inputs), INNER=inputs, WIDTH=width, **added_constants,
        HAS_BIAS=bias_span is not None, PDL=pdl, num_warps=_WARPS, **launches.options(pdl),
    )  # fmt: skip
    assert (planes is None) == (target_down is None), "planes are for a target"
    if planes is not None and target_down is not None:
        prepare_planes(out_TI, planes, target_down, deltas, entry_T, kinds)
