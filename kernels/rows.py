"""What kernels with a program for each row and slice share: a row's own vectors, and their launch arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import configs
from kernels.device import UNIT, DeviceDeltas, Field, Kinds, Partials, Planes, Target
from kernels.fragments import TILE_COLUMNS, tiles
from kernels.planes import LARGEST, MAX_INPUTS, slice_width

_UNIT_BITS = tl.constexpr(UNIT * 8)
_LARGEST = tl.constexpr(float(LARGEST))
_FLOATS = tl.constexpr(UNIT // 4)
_COL = tl.constexpr(int(Field.COL))
_PLANES = tl.constexpr(int(Field.PLANES))
_PROGRAMS = 64
"""Every one of a row's programs reads all of the row, 100 to 200 KB: more of them would spend on the second-level cache
what they save on packing bits."""
_MAX_PARTS = 8
_WIDEST_SLICE = 2048
"""Columns whose planes a program has in registers at once."""


@triton.jit
def vector_pointer(SLAB, STARTS, entry, start):
    """Where element `start` of the entry's block of vectors lies.

    Args:
        SLAB: the slab as the compute dtype. STARTS: `DeviceDeltas.vectors_E`.
    """
    per_unit: tl.constexpr = _UNIT_BITS // SLAB.dtype.element_ty.primitive_bitwidth
    return SLAB + tl.load(STARTS + entry).to(tl.int64) * per_unit + start


@triton.jit
def column_sets(TABLE_ROW, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many column sets a row has planes of: one, unless its variant has column scales.

    Args:
        TABLE_ROW: `table_EJF` at the row's entry and the target. COLUMNS: whether any variant has column scales.
    """
    sets = 1
    if COLUMNS:
        sets = tl.where(tl.load(TABLE_ROW + _COL) >= 0, tl.load(TABLE_ROW + _PLANES) * MEMBERS, 1)
    return sets


@triton.jit
def columns_at(FLOATS, TABLE_ROW, c, k, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """The column scales of set c at columns k, 1 where the row's variant has none. FLOATS: the slab as float32."""
    scales = 1.0
    if COLUMNS:
        offset = tl.load(TABLE_ROW + _COL)
        SET = FLOATS + offset.to(tl.int64) * _FLOATS + c * (BLOCKS * 256)
        scales = tl.load(SET + k, mask=k < tl.where(offset >= 0, BLOCKS * 256, 0), other=1.0)
    return scales


@triton.jit
def store_statistics(SCALE, SUM, amax, total):
    """What the planes of one row of one column set are scaled with, and what they add up to."""
    tl.store(SCALE, tl.maximum(amax, 1e-30) / _LARGEST)
    tl.store(SUM, total)


@dataclass(frozen=True, slots=True)
class RowConfig:
    """Only speed depends on it."""

    parts: int
    """Most programs for each row; those that write no planes have one"""
    warps: int


def row_config(op: str, rows: int, columns: int, device: torch.device) -> RowConfig:
    """What was measured for this op (its folder's name), else a rule: one row must not be the serial work of one
    multiprocessor, many rows need not be cut; 16 columns for each thread."""
    if device.type == "cuda":
        key = f"{columns} {triton.next_power_of_2(rows)}"
        if (found := configs.lookup(op, torch.cuda.get_device_name(device), key)) is not None:
            return RowConfig(**found)
    return RowConfig(max(1, min(_MAX_PARTS, _PROGRAMS // rows)), warps_of(columns))


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
    """Of a kernel that writes planes: (WORDS, SCALE, SUM, FLOATS, TABLE, target, targets, both strides), the constants,
    and how many programs a row has. Each writes the planes of EACH slices of KS columns, one after another."""
    if planes is None or target is None:
        assert planes is None
        assert target is None
        return [None] * 5 + [0] * 4, {"PLANES": False, "MEMBERS": 0, "COLUMNS": False, "KS": 0, "EACH": 0}, 1
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
    width = min(_WIDEST_SLICE, slice_width(inputs, parts))
    slices = triton.cdiv(inputs, width)
    each = triton.cdiv(slices, parts)
    constants = {"PLANES": True, "MEMBERS": len(target.members), "COLUMNS": kinds.columns, "KS": width, "EACH": each}
    return arguments, constants, triton.cdiv(slices, each)


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


def padded(columns: int) -> int:
    """KP: a tile that holds a row, and at least one block of planes."""
    return max(TILE_COLUMNS, triton.next_power_of_2(columns))
