"""Decode-sized linears with sign planes against float64: popularity mixes, odd shapes, poisoned surroundings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.delta_linear.choice import Config
from kernels.delta_linear.device import delta_linear
from kernels.device import Kinds, Partials, Planes, Target
from kernels.planes import prepare_planes
from tests.kernels.b1 import emulated
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, Rows, World, poisoned, rows, world

FLAT = Config("flat", split=2, outputs=64, inner=32, stages=2, tiles=2)
TWO = Config("signs", tiles=2)


@pytest.fixture(autouse=True)
def b1() -> Iterator[None]:
    with emulated():
        yield


def activations(count: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=gen) * torch.logspace(-1, 1, count)[:, None]
    return x.to(dtype).to(DEVICE)


def run(
    made: World, target: Target, batch: Rows, x: torch.Tensor, config: Config, width: int | None = None,
    kinds: Kinds | None = None,
) -> tuple[torch.Tensor, Partials]:  # fmt: skip
    """The base's weight, and what the linear writes into poisoned buffers."""
    count, width, kinds = len(x), width or target.outputs, kinds or made.kinds()
    weight = (torch.randn(target.outputs, target.inputs, generator=torch.Generator().manual_seed(9)) * 0.05).to(x)
    planes = Planes.empty(kinds.sets(target), count, target.inputs, DEVICE)
    planes = Planes(*(poisoned(t.shape, t.dtype) for t in (planes.words_CTW, planes.scale_CT, planes.sum_CT)))
    if kinds.signs:
        prepare_planes(x, planes, target, made.deltas, batch.entry_T, kinds, parts=2)
    out = Partials(
        poisoned((config.split, count, width), config.base_dtype(x.dtype)),
        poisoned((count, width), torch.float32) if kinds != Kinds() else None,
    )
    workspace = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    delta_linear(
        x, planes if kinds.signs else None, weight, target, made.deltas, batch.entry_T, batch.segments_G4, kinds, out,
        workspace, config=config,
    )  # fmt: skip
    return weight, out


def check(
    made: World, target: Target, batch: Rows, x: torch.Tensor, config: Config, *, width: int | None = None,
    share: float = 2e-3,
) -> None:  # fmt: skip
    """Against float64. `share`: of the delta's own size that its error may be."""
    weight, out = run(made, target, batch, x, config, width)
    base = x.double() @ weight.double().T
    rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[out.base_STN.dtype]
    actual = out.base_STN.double().sum(0)
    for row in range(len(x)):
        near(actual[row, : target.outputs], base[row], rounding)
    assert (actual[:, target.outputs :] == 0).all()
    delta = out.delta_TN
    assert delta is not None
    covered = torch.zeros(len(x), dtype=torch.bool)
    for entry, start, stop in batch.segments:
        covered[start:stop] = True
        matrix = made.matrix(entry, target).double().to(DEVICE)
        expected = x[start:stop].double() @ matrix.T
        for row, wanted in zip(delta[start:stop], expected, strict=True):
            near(row[: len(wanted)], wanted, share)
        assert (delta[start:stop, len(matrix) :] == 0).all()
    assert delta[~covered.to(DEVICE)].isnan().all(), "rows of the base are left alone"


def near(actual: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Within a share of the expected values' root mean square; NaN never is."""
    assert (actual.double() - expected).abs().max() <= share * expected.square().mean().sqrt()


SIGN_ENTRIES = [
    {"signs": 1}, {"signs": 1}, {}, {"signs": 1}, {"signs": 1}, {"signs": 1}, {"signs": 1}, {"signs": 1}, {"signs": 1},
]  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("config", [FLAT, TWO, Config("unpack")], ids=lambda c: c.impl)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixes(mix: str, config: Config, dtype: torch.dtype) -> None:
    target = Target(1, 40, 700)
    made = world([Target(0, 16, 8), target], SIGN_ENTRIES, dtype)
    batch = rows(MIXES[mix], padding=2, spare_segments=2)
    check(made, target, batch, activations(len(batch.entry_T), 700, dtype), config)
