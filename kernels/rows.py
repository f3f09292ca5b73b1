"""What kernels with a program for each row and slice share: a row's own vectors, and their launch arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.device import UNIT, DeviceDeltas, Kinds, Partials, Planes, Target
from kernels.fragments import tiles
from kernels.planes import MAX_INPUTS, slices

_UNIT_BITS = tl.constexpr(UNIT * 8)


@triton.jit
def vector_pointer(SLAB, STARTS, entry, start):
    """Where element `start` of the entry's block of vectors lies.

    Args:
        SLAB: the slab as the compute dtype. STARTS: `DeviceDeltas.vectors_E`.
    """
    per_unit: tl.constexpr = _UNIT_BITS // SLAB.dtype.element_ty.primitive_bitwidth
    return SLAB + tl.load(STARTS + entry).to(tl.int64) * per_unit + start


def partial_arguments(partials: Partials | None, rows: int, columns: int) -> tuple[list[Any], dict[str, Any]]:
    """(BASE, DELTA) and (SPLIT, HAS_DELTA) of `sum_partials`; asserts the shapes."""
    if partials is None:
        return [None, None], {"SPLIT": 0, "HAS_DELTA": False}
    base, delta = partials.base_STN, partials.delta_TN
    assert base.shape[1:] == (rows, columns), f"partials {list(base.shape)} of {rows} rows of {columns}"
    assert base.is_contiguous()
    assert delta is None or (delta.shape == (rows, columns) and delta.is_contiguous())
    return [base, delta], {"SPLIT": base.shape[0], "HAS_DELTA": delta is not None}


def plane_arguments(
    planes: Planes | None, target: Target | None, deltas: DeviceDeltas, kinds: Kinds, rows: int, inputs: int
) -> tuple[list[Any], dict[str, Any], int]:
    """Of a kernel that writes planes: (WORDS, SCALE, SUM, FLOATS, TABLE, target, targets, both strides), the constants,
    and how many warps a program has. Each writes the planes of KS columns."""
    if planes is None or target is None:
        assert planes is None
        assert target is None
        return [None] * 5 + [0] * 4, {"PLANES": False, "MEMBERS": 0, "COLUMNS": False, "KS": 0}, warps_of(inputs)
    assert target.inputs == inputs <= MAX_INPUTS, f"{inputs} inputs, the target has {target.inputs}"
    assert planes.words_CTW.shape[0] >= kinds.sets(target), f"no room for {kinds.sets(target)} column sets"
    assert planes.words_CTW.shape[1:] == (rows, tiles(1, inputs)[1] * 128)
    arguments = [
        planes.words_CTW,
        planes.scale_CT,
        planes.sum_CT,
        deltas.slab.view(torch.float32),
        deltas.table_EJF,
        target.index,
        deltas.table_EJF.shape[1],
        planes.words_CTW.stride(0),
        planes.scale_CT.stride(0),
    ]
    width, warps = slices(rows, inputs)
    constants = {"PLANES": True, "MEMBERS": len(target.members), "COLUMNS": kinds.columns, "KS": width}
    return arguments, constants, warps


def span_start(span: tuple[int, int] | None, elements: int) -> int:
    """Where a vector of that many elements begins in each entry's block; 0 if there is none."""
    if span is None:
        return 0
    assert span[1] - span[0] == elements, f"elements {span[0]}:{span[1]} for a vector of {elements}"
    return span[0]


def warps_of(columns: int) -> int:
    """Warps for 16 columns in each thread, 1 to 16."""
    return max(1, min(16, triton.next_power_of_2(columns) // 512))


def check_contiguous(*tensors: torch.Tensor) -> None:
    """Kernels index them as if they were."""
    assert all(t.is_contiguous() for t in tensors)
