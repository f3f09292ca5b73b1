"""Bit planes of activations against their float32 specification."""

# Triton's constexpr:
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.device import NONE, UNIT, Field, Kinds, Planes, Target
from kernels.planes import planes_reference, prepare_planes, sum_partials, values
from tests.kernels.device_harness import DEVICE, DTYPES, World, poisoned, rows, world


def poisoned_planes(sets: int, count: int, inputs: int) -> Planes:
    empty = Planes.empty(sets, count, inputs, DEVICE)
    return Planes(*(poisoned(t.shape, t.dtype) for t in (empty.words_CTW, empty.scale_CT, empty.sum_CT)))


def activations(count: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(count, inputs, generator=gen) * torch.logspace(-2, 2, count)[:, None]).to(dtype).to(DEVICE)


def columns(made: World, entry: int, target: Target) -> torch.Tensor | None:
    """float32 [C, K]: one entry's column scales, as they lie in the slab."""
    offset, planes = made.deltas.table_EJF[entry, target.index, [Field.COL, Field.PLANES]].tolist()
    if offset == NONE:
        return None
    count, width = planes * len(target.members), target.tiles[1] * 256
    floats = made.deltas.slab.view(torch.float32)[offset * UNIT // 4 :]
    return floats[: count * width].view(count, width)[:, : target.inputs]


def assert_same_planes(actual: Planes, expected: Planes, inputs: int) -> None:
    """Equal, up to one unit where a device divides less exactly."""
    off = (values(actual, inputs) - values(expected, inputs)).abs()
    unit = expected.scale_CT[..., None] * (1e-3 if DEVICE.type == "cpu" else 1.01)
    assert (off <= unit).all()
    if DEVICE.type == "cpu":
        assert torch.equal(actual.words_CTW, expected.words_CTW)
        assert torch.equal(actual.sum_CT, expected.sum_CT)
    torch.testing.assert_close(actual.scale_CT, expected.scale_CT)


@pytest.mark.parametrize("inputs", [8, 250, 256, 700, 1536])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes(inputs: int, dtype: torch.dtype) -> None:
    target = Target(0, 16, inputs)
    made, batch = world([target], [{"signs": 1}], dtype), rows([0, 1, 1])
    x = activations(3, inputs, dtype)
    x[1] = 0
    planes = poisoned_planes(1, 3, inputs)
    prepare_planes(x, planes, target, made.deltas, batch.entry_T, made.kinds())
    assert_same_planes(planes, planes_reference(x.float()[None]), inputs)


@pytest.mark.parametrize("parts", [1, 3])
def test_column_sets(parts: int) -> None:
    """Each row has its own variant's column scales, or none; sets that it does not have stay unwritten."""
    target, count = Target(1, 48, 600, (0, 32)), 4
    specs = [{"signs": 2, "col": True}, {"signs": 1}, {"signs": 2, "col": True}]
    made = world([Target(0, 16, 8), target], specs, torch.float32)
    batch = rows([0, 1, 2, 3])
    x = activations(count, 600, torch.float32)
    planes = poisoned_planes(4, count, 600)
    prepare_planes(x, planes, target, made.deltas, batch.entry_T, made.kinds(), parts=parts)
    for row in range(count):
        col = columns(made, row, target)
        scaled = x[None, row : row + 1] if col is None else x[row] * col[:, None]
        expected, sets = planes_reference(scaled), len(scaled)
        actual = [t[:sets, row : row + 1] for t in (planes.words_CTW, planes.scale_CT, planes.sum_CT)]
        assert_same_planes(Planes(*(t.contiguous() for t in actual)), expected, 600)
        assert (planes.words_CTW[sets:, row] == -12345).all()


def test_values_invert_the_reference() -> None:
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(1))
    planes = planes_reference(x)
    torch.testing.assert_close(values(planes, 300), x, rtol=0, atol=float(planes.scale_CT.max()) * 0.501)


@triton.jit
def _summed(BASE, DELTA, ENTRY, OUT, T, N, SPLIT: tl.constexpr, HAS_DELTA: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, 64)
    y = sum_partials(BASE, DELTA, row, cols, cols < N, T, N, tl.load(ENTRY + row), SPLIT, HAS_DELTA)
    tl.store(OUT + row * N + cols, y, mask=cols < N)


@pytest.mark.parametrize(("split", "has_delta"), [(1, False), (3, True), (2, False)])
def test_sum_partials_reads_no_delta_of_base_rows(split: int, has_delta: bool) -> None:
    gen = torch.Generator().manual_seed(split)
    base, delta = torch.randn(split, 3, 40, generator=gen), torch.randn(3, 40, generator=gen)
    delta[1] = torch.nan
    entry, out = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE), poisoned((3, 40), torch.float32)
    _summed[(3,)](base.to(DEVICE), delta.to(DEVICE) if has_delta else None, entry, out, 3, 40, split, has_delta)
    expected = base.double().sum(0)
    if has_delta:
        expected[[0, 2]] += delta[[0, 2]]
    torch.testing.assert_close(out.cpu(), expected.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_bad_row_spoils_no_other() -> None:
    target, made = Target(0, 16, 300), world([Target(0, 16, 300)], [{"signs": 1}], torch.float32)
    x = activations(3, 300, torch.float32)
    x[1, 7] = torch.inf
    planes = poisoned_planes(1, 3, 300)
    prepare_planes(x, planes, target, made.deltas, rows([1, 1, 1]).entry_T, Kinds(signs=True))
    good, expected = [0, 2], planes_reference(x[None, [0, 2]].float())
    actual = Planes(planes.words_CTW[:, good], planes.scale_CT[:, good], planes.sum_CT[:, good])
    assert_same_planes(actual, expected, 300)
