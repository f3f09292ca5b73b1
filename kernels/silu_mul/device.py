"""SiLU of gate, times up, and bit planes of the product for the down projection, in one launch."""

# Launch options are no parameters of kernels:
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton

from kernels import launches
from kernels.device import DeviceDeltas, Kinds, Partials, Planes, Target
from kernels.rows import check_contiguous, padded, partial_arguments, plane_arguments, row_config, span_start, warps_of
from kernels.silu_mul.triton_silu_mul import silu_mul_kernel

_CHUNK = 4096
_PLAIN_WIDTH = 2048
"""Columns of each program when there are no planes, and so no statistics of the row."""


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
    config = row_config("silu_mul", rows, inputs, out_TI.device)
    plane, constants, parts = plane_arguments(planes, target_down, deltas, kinds, rows, inputs, config.parts)
    chunk = min(padded(inputs), _CHUNK)
    if planes is None:
        constants["KS"] = min(padded(inputs), _PLAIN_WIDTH)
        parts = triton.cdiv(inputs, constants["KS"])
    pdl = launches.early(out_TI)
    silu_mul_kernel[(rows, parts)](
        *added, deltas.slab.view(out_TI.dtype), deltas.vectors_E, entry_T, out_TI, *plane[:5], rows,
        span_start(bias_span, 2 * inputs), *plane[5:], INNER=inputs, CHUNK=chunk, CHUNKS=triton.cdiv(inputs, chunk),
        **added_constants, HAS_BIAS=bias_span is not None, **constants,
        PDL=pdl, num_warps=warps_of(constants["KS"]) if planes is None else config.warps, **launches.options(pdl),
    )  # fmt: skip
