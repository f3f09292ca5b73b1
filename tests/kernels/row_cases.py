"""Inputs and expectations that the tests of row-wise kernels share."""

from __future__ import annotations

import torch

from kernels.device import UNIT, Partials, Planes, Target
from kernels.planes import planes_reference
from tests.kernels.device_harness import DEVICE, POISON, Rows, World
from tests.kernels.test_device_planes import assert_same_planes, columns


def random_partials(
    split: int, batch: Rows, outputs: int, dtype: torch.dtype, gen: torch.Generator, *, delta: bool = True
) -> Partials:
    """Base partials in `dtype` if there is one, else float32; the delta is NaN where it is never written."""
    count = batch.entry_T.shape[0]
    base_STN = torch.randn(split, count, outputs, generator=gen).to(DEVICE)
    delta_TN = torch.randn(count, outputs, generator=gen).to(DEVICE)
    delta_TN[batch.entry_T == 0] = torch.nan
    return Partials(base_STN.to(dtype) if split == 1 else base_STN, delta_TN if delta else None)


def summed(partials: Partials, batch: Rows) -> torch.Tensor:
    """float32 [T, N]: what the consumer takes partials for."""
    total_TN = partials.base_STN.float().sum(0)
    if partials.delta_TN is None:
        return total_TN
    return torch.where(batch.entry_T[:, None] > 0, total_TN + partials.delta_TN, total_TN)


def vectors_of(made: World, entries: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """float32 [T, stop - start]: each row's own variant's vector."""
    return made.vectors_EV.to(DEVICE)[entries.long(), span[0] : span[1]].float()


def spoil_vectors(made: World, entry: int) -> None:
    """Make every vector of one entry NaN: for a variant that no row has."""
    begin, size = int(made.deltas.vectors_E[entry]) * UNIT, made.vectors_EV[entry].nbytes
    made.deltas.slab[begin : begin + size] = POISON


def assert_planes(planes: Planes, out_TK: torch.Tensor, made: World, entries: torch.Tensor, target: Target) -> None:
    """They are those of `out`, times each row's own column scales; sets that a row has not are not touched."""
    inputs = out_TK.shape[1]
    for row, entry in enumerate(entries.tolist()):
        col_CK = columns(made, entry, target)
        x_CK = out_TK[row : row + 1].float() if col_CK is None else out_TK[row].float() * col_CK
        parts = (planes.words_CTW, planes.scale_CT, planes.sum_CT)
        own = Planes(*(t[: len(x_CK), row : row + 1].contiguous() for t in parts))
        assert_same_planes(own, planes_reference(x_CK[:, None]), inputs)
        assert (planes.words_CTW[len(x_CK) :, row] == -12345).all()
