"""What kernels with a program for each row and slice share: a row's own vectors, and their launch arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.device import UNIT, DeviceDeltas, Kinds, Partials, Planes, Target
from kernels.fragments import TILE_COLUMNS, tiles
from kernels.planes import MAX_INPUTS, slice_width

_UNIT_BITS = tl.constexpr(UNIT * 8)
_PROGRAMS = 256
"""Enough for every multiprocessor to have one or two."""
_MAX_PARTS = 8


@triton.jit
def vector_pointer(SLAB, STARTS, entry, start):
    """Where element `start` of the entry's block of vectors lies.

    Args:
        SLAB: the slab as the compute dtype. STARTS: `DeviceDeltas.vectors_E`.
    """
    per_unit: tl.constexpr = _UNIT_BITS // SLAB.dtype.element_ty.primitive_bitwidth
    return SLAB + tl.load(STARTS + entry).to(tl.int64) * per_unit + start


def parts_of(rows: int) -> int:
    """Programs for each row: one row must not be the serial work of one multiprocessor, many rows need not be cut."""
    return max(1, min(_MAX_PARTS, _PROGRAMS // rows))


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
    planes: Planes | None, target: Target | None, deltas: DeviceDeltas, kinds: Kinds, rows: int, inputs: int, parts: int
) -> tuple[list[Any], dict[str, Any], int]:
    """What `store_row` wants: (WORDS, SCALE, SUM, FLOATS, TABLE, target, targets, the strides), its constants, and into
    how many slices it cuts a row."""
    if planes is None or target is None:
        assert planes is None
        assert target is None
        return [None] * 5 + [0, 0, 0, 0], {"PLANES": False, "MEMBERS": 0, "COLUMNS": False, "KS": 0}, 1
    assert target.inputs == inputs <= MAX_INPUTS, f"{inputs} inputs, the target has {target.inputs}"
    assert planes.words_CTW.shape == (planes.scale_CT.shape[0], rows, tiles(1, inputs)[1] * 128)
    sets, width = kinds.sets(target), slice_width(inputs, parts)
    assert planes.words_CTW.shape[0] >= sets, f"{sets} column sets, room for {planes.words_CTW.shape[0]}"
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
    constants = {"PLANES": True, "MEMBERS": len(target.members), "COLUMNS": kinds.columns, "KS": width}
    return arguments, constants, triton.cdiv(inputs, width)


def span_start(span: tuple[int, int] | None, elements: int) -> int:
    """Where a vector of that many elements begins in each entry's block; 0 if there is none."""
    if span is None:
        return 0
    assert span[1] - span[0] == elements, f"elements {span[0]}:{span[1]} for a vector of {elements}"
    return span[0]


def warps_of(columns: int, per_thread: int) -> int:
    """Warps for which each thread has that many of a row's columns, 1 to 16."""
    return max(1, min(16, triton.next_power_of_2(columns) // (32 * per_thread)))


def check_contiguous(*tensors: torch.Tensor) -> None:
    """Kernels index them as if they were."""
    assert all(t.is_contiguous() for t in tensors)


def padded(columns: int) -> int:
    """KP: a tile that holds a row, and at least one block of planes."""
    return max(TILE_COLUMNS, triton.next_power_of_2(columns))
