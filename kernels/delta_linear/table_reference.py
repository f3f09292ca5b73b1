"""What the device tables stand for: the specification of the kernels that read deltas through them.

Not covered: speed. It reads tables on the host, which waits for the device.
"""

from __future__ import annotations

from math import prod

import torch

from kernels import fragments, kept
from kernels.delta_linear import reference
from kernels.deltas import SignDelta
from kernels.device import BYTES, NONE, UNIT, DeviceDeltas, Field, Target


def matrix(deltas: DeviceDeltas, target: Target, entry: int, dtype: torch.dtype) -> torch.Tensor:
    """D [N, K] of an entry in float32, without replaced rows; N the entry's own number of outputs.

    Args:
        dtype: the compute dtype, which low-rank and dense parts are stored in.
    """
    outputs = int(deltas.table_EJF[entry, target.index, Field.OUTPUTS]) or target.outputs
    total_NK = torch.zeros(outputs, target.inputs, device=deltas.slab.device)
    for part in (
        signs(deltas, target, entry),
        low_rank(deltas, target, entry, dtype),
        dense(deltas, target, entry, dtype),
        compact(deltas, target, entry),
    ):
        if part is not None:
            total_NK[: part.shape[0]] += part
    return total_NK


def signs(deltas: DeviceDeltas, target: Target, entry: int) -> torch.Tensor | None:
    """The sum of the entry's sign planes with its zero term, in float32."""
    row = deltas.table_EJF[entry, target.index].tolist()
    planes, inputs, outputs = row[Field.PLANES], target.inputs, row[Field.OUTPUTS] or target.outputs
    if not planes:
        return None
    high, wide = fragments.tiles(outputs, inputs)
    packed = _part(deltas, row[Field.SIGN], torch.int32, planes, high, wide, 32, 4)
    sign_PNk = fragments.unpack(packed, outputs, inputs)
    scale_PN = _part(deltas, row[Field.SCALE], torch.float32, planes, high * 16)[:, :outputs]
    total_NK = torch.zeros(outputs, inputs, device=deltas.slab.device)
    col_PmK = None
    if row[Field.COL] != NONE:
        col_PmK = _part(deltas, row[Field.COL], torch.float32, planes, len(target.members), wide * 256)[..., :inputs]
    for m, (first, stop) in enumerate(zip(target.members, [*target.members[1:], outputs], strict=True)):
        col_PK = None if col_PmK is None else col_PmK[:, m]
        part = SignDelta(sign_PNk[:, first:stop], scale_PN[:, first:stop], col_PK, inputs)
        total_NK[first:stop] = reference.matrix(part)
    if row[Field.ZERO] != NONE:
        total_NK += _part(deltas, row[Field.ZERO], torch.float32, high * 16)[:outputs, None]
    return total_NK


def low_rank(deltas: DeviceDeltas, target: Target, entry: int, dtype: torch.dtype) -> torch.Tensor | None:
    """B A of every member, in float32."""
    row = deltas.table_EJF[entry, target.index].tolist()
    rank, members = row[Field.RANK] // 16 * 16, target.members
    if not rank:
        return None
    as_bytes = row[Field.RANK] % 16 == BYTES
    stored = torch.int8 if as_bytes else dtype
    a_mrK = _part(deltas, row[Field.LORA_A], stored, len(members), rank, target.inputs).float()
    b_Nr = _part(deltas, row[Field.LORA_B], stored, target.outputs, rank).float()
    if as_bytes:
        behind = row[Field.LORA_A] * UNIT + a_mrK.numel()
        scales = deltas.slab[behind : behind + 4 * len(members) * rank].view(torch.float32)
        a_mrK *= scales.view(len(members), rank, 1)
    spans = zip(members, [*members[1:], target.outputs], strict=True)
    return torch.cat([b_Nr[first:stop] @ a_rK for a_rK, (first, stop) in zip(a_mrK, spans, strict=True)])


def dense(deltas: DeviceDeltas, target: Target, entry: int, dtype: torch.dtype) -> torch.Tensor | None:
    row = deltas.table_EJF[entry, target.index].tolist()
    if row[Field.DENSE] == NONE:
        return None
    return _part(deltas, row[Field.DENSE], dtype, row[Field.OUTPUTS] or target.outputs, target.inputs).float()


def compact(deltas: DeviceDeltas, target: Target, entry: int) -> torch.Tensor | None:
    """Kept values among zeros, in float32."""
    row = deltas.table_EJF[entry, target.index].tolist()
    if not row[Field.FORM]:
        return None
    form, inputs, outputs = kept.Form.of(row[Field.FORM]), target.inputs, row[Field.OUTPUTS] or target.outputs
    values, high = form.values(inputs), fragments.tiles(outputs, 1)[0]
    packed = _part(deltas, row[Field.KEPT], torch.int32, *form.tile_shape(outputs, inputs))
    step_N = _part(deltas, row[Field.INPUTS], torch.float32, high * 16)[:outputs]
    places = _part(deltas, row[Field.INPUTS], torch.uint8, high * 64 + prod(form.input_shape(outputs, inputs)))
    places_MCLj = places[high * 64 :].view(form.input_shape(outputs, inputs))
    columns_MV = kept.unpack_inputs(places_MCLj, form, values)
    q_NV = kept.unpack_values(packed, high * 16, values)[:outputs].float()
    wide_NK = torch.zeros(outputs, values // form.kept * form.group, device=deltas.slab.device)
    columns_NV = columns_MV.repeat_interleave(form.mask_rows, 0)[:outputs]
    wide_NK.scatter_(1, columns_NV, (2 * q_NV - (2**form.bits - 1)) * step_N[:, None])
    return wide_NK[:, :inputs]


def _part(deltas: DeviceDeltas, offset: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return deltas.slab[offset * UNIT : offset * UNIT + size].view(dtype).view(shape)
