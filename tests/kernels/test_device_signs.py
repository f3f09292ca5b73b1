"""Decode-sized linears with sign planes against float64: popularity mixes, odd shapes, poisoned surroundings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.delta_linear import wide
from kernels.delta_linear.choice import Config
from kernels.delta_linear.device import delta_linear, partials_of
from kernels.delta_linear.self_check import TOLERANCE, native_b1, product_error, self_check
from kernels.device import Kinds, Partials, Planes, Target, segment_table
from kernels.planes import prepare_planes
from tests.kernels.b1 import byte_mma, emulated, mma
from tests.kernels.device_harness import DEVICE, DTYPES, ENTRIES, MIXES, Rows, World, poisoned, rows, world

FLAT = Config("flat", outputs=64, inner=32, stages=2, depth=2, resident=3)
TWO = Config("signs", tiles=2, spread=2, depth=3)
WIDE = Config("signs", tiles=4, spread=4, warps=8, resident=5)


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
        poisoned((config.split(target, width, DEVICE), count, width), config.base_dtype(x.dtype)),
        poisoned((count, width), torch.float32) if kinds != Kinds() else None,
    )
    workspace = torch.empty(wide.workspace_bytes(target, count, kinds, x.dtype), dtype=torch.uint8, device=DEVICE)
    delta_linear(
        x, planes if kinds.signs else None, weight, target, made.deltas, batch.segments_G4, kinds, out,
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


SIGN_ENTRIES = [{"signs": 1}, {"signs": 1}, {}, *[{"signs": 1}] * 6]
SETTINGS = [(FLAT, DTYPES[0]), (TWO, DTYPES[1]), (Config("unpack"), DTYPES[1])]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("config", "dtype"), SETTINGS, ids=lambda value: getattr(value, "impl", str(value)))
def test_mixes(mix: str, config: Config, dtype: torch.dtype) -> None:
    target = Target(1, 24, 300)
    made = world([Target(0, 16, 8), target], SIGN_ENTRIES, dtype)
    batch = rows(MIXES[mix], padding=2, spare_segments=2)
    check(made, target, batch, activations(len(batch.entry_T), 300, dtype), config)


@pytest.mark.parametrize("config", [FLAT, TWO], ids=["flat", "signs"])
def test_single_rows(config: Config) -> None:
    """What is launched where no variant has more than one row gives the very same."""
    target, dtype = Target(1, 72, 1100), DTYPES[0]
    made = world([Target(0, 16, 8), target], SIGN_ENTRIES, dtype)
    batch = rows([1, 2, 3, 5, 9, 0, 0], padding=1, spare_segments=2)
    x = activations(len(batch.entry_T), 1100, dtype)
    _, several = run(made, target, batch, x, config)
    _, single = run(made, target, batch, x, config, kinds=replace(made.kinds(), single=True))
    assert several.delta_TN is not None
    assert single.delta_TN is not None
    for _, start, stop in batch.segments:
        assert several.delta_TN[start:stop].isfinite().all()
        assert torch.equal(single.delta_TN[start:stop], several.delta_TN[start:stop])


@pytest.mark.parametrize(("config", "dtype"), SETTINGS, ids=lambda value: getattr(value, "impl", str(value)))
def test_every_kind_in_one_batch(config: Config, dtype: torch.dtype) -> None:
    """All of them, in a fused target whose blocks of tiles do not end where its members do."""
    target = Target(1, 58, 260, (0, 16, 48))
    specs = [*ENTRIES.values(), {"quant": 4}]
    made = world([Target(0, 16, 8), target], specs, dtype, seed=3)
    batch = rows([*range(1, len(specs) + 1), 0, 3, 10, 10])
    share = 2e-3 if dtype == torch.float32 and config.impl != "unpack" else 3e-2
    check(made, target, batch, activations(len(batch.entry_T), 260, dtype), config, share=share)


@pytest.mark.parametrize("lengths", [[1], [1, 3], [4], [2, 1, 5, 8, 9], [33]], ids=str)
@pytest.mark.parametrize("config", [TWO, WIDE, Config("unpack")], ids=["signs", "wide", "unpack"])
def test_segments_of_every_length(lengths: list[int], config: Config) -> None:
    """Kernels take one or eight rows of a variant at a time."""
    target, made = Target(0, 10, 260), world([Target(0, 10, 260)], [{"signs": 1}] * len(lengths), torch.float32)
    batch = rows([entry for entry, n in enumerate(lengths, start=1) for _ in range(n)])
    check(made, target, batch, activations(sum(lengths), 260, torch.float32), config)


def one_by_one(batch: Rows) -> Rows:
    """The same rows, each a segment of its own."""
    runs = [(entry, row, row + 1) for entry, start, stop in batch.segments for row in range(start, stop)]
    return replace(batch, segments_G4=torch.tensor(segment_table(runs), dtype=torch.int32, device=DEVICE))


def both_ways(made: World, target: Target, batch: Rows, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Deltas with the batch's segments, and with one for each row and the kernels of steps that have no others."""
    x = activations(len(batch.entry_T), target.inputs, torch.float32)
    _, several = run(made, target, batch, x, config)
    _, single = run(made, target, one_by_one(batch), x, config, kinds=replace(made.kinds(), single=True))
    assert several.delta_TN is not None
    assert single.delta_TN is not None
    return several.delta_TN, single.delta_TN


LENGTHS = {"flat": (FLAT, 300, [2, 3, 7, 9]), "wide": (WIDE, 1301, [8, 2, 1]), "parts": (TWO, 4400, [3, 1, 2])}


@pytest.mark.parametrize(("config", "inputs", "lengths"), LENGTHS.values(), ids=LENGTHS)
def test_several_rows_are_what_each_is_alone(config: Config, inputs: int, lengths: list[int]) -> None:
    """Bit for bit, in other products; beside rows of the base and of a variant without signs, an odd number of outputs
    and tiles, and (parts) more columns than registers hold digits of."""
    target = Target(1, 41, inputs)
    made = world([Target(0, 16, 8), target], [{"signs": 1}] * len(lengths) + [{}], torch.float32)
    entries = [entry for entry, n in enumerate([1, *lengths, 1]) for _ in range(n)]
    batch = rows(entries, padding=1, spare_segments=2)
    several, single = both_ways(made, target, batch, config)
    for _, start, stop in batch.segments:
        assert several[start:stop].isfinite().all()
    assert torch.equal(several.isnan(), single.isnan()), "rows of the base are left alone"
    assert torch.equal(several.nan_to_num(), single.nan_to_num())


def test_several_rows_of_several_planes() -> None:
    """With zero terms, column scales of members, and parts of columns: each adds to what is there."""
    target = Target(0, 41, 4400, (0, 16, 32))
    made = world([target], [{"signs": 1}, {"signs": 2, "col": True}, {"quant": 2}], torch.float32, seed=5)
    batch = rows([0, 1, 1, 2, 2, 3, 3, 3], padding=1, spare_segments=1)
    several, single = both_ways(made, target, batch, TWO)
    for _, start, stop in batch.segments:
        near(several[start:stop], single[start:stop].double(), 1e-6)


def test_settings_do_not_change_a_bit() -> None:
    """Sums are integers, and each is scaled in one way: tests of one configuration hold for all."""
    target = Target(0, 40, 260, (0, 32))
    made = world([target], [{"signs": 2, "col": True}, {"signs": 1}, {"signs": 2}], torch.float32)
    batch = rows([1, 2, 3, 3, 3, 3, 3])
    x = activations(7, 260, torch.float32)
    results = [
        run(made, target, batch, x, Config("signs", tiles=a, spread=b, warps=c, resident=d))[1].delta_TN
        for a, b, c, d in ((1, 4, 4, 1), (4, 1, 4, 7), (2, 8, 8, 2))
    ]
    assert results[0] is not None
    for result in results[1:]:
        assert result is not None
        assert torch.equal(result, results[0])


def test_larger_vocabularies() -> None:
    """Columns up to each variant's own number of outputs; zeros from there on, in the base too."""
    target, specs = Target(0, 40, 260), [{"signs": 1, "extra": 10}, {"signs": 1}, {"signs": 1, "extra": 27}, {}]
    made, batch = world([target], specs, torch.float32), rows([1, 2, 3, 4])
    for config in (FLAT, TWO, Config("unpack")):
        check(made, target, batch, activations(4, 260, torch.float32), config, width=90)


@pytest.mark.parametrize("config", [FLAT, TWO], ids=lambda c: c.impl)
@pytest.mark.parametrize("inputs", [7, 250, 768])
def test_base_alone(config: Config, inputs: int) -> None:
    target = Target(0, 40, inputs)
    made, batch, x = world([target], [], torch.float32), rows([0] * 3), activations(3, inputs, torch.float32)
    weight, out = run(made, target, batch, x, config)
    assert out.delta_TN is None
    near(out.base_STN.double().sum(0), x.double() @ weight.double().T, 1e-5)


@pytest.mark.parametrize("config", [FLAT, TWO, Config("unpack")], ids=lambda c: c.impl)
def test_no_segments_at_all(config: Config) -> None:
    """A wide step of the base's rows has none, not even empty ones: there is nothing that a kernel could read."""
    target = Target(0, 40, 260)
    made, batch, x = world([target], [{"signs": 1}], torch.float32), rows([0] * 3), activations(3, 260, torch.float32)
    batch = replace(batch, segments_G4=batch.segments_G4[:0])
    weight, out = run(made, target, batch, x, config)
    assert out.delta_TN is not None
    assert out.delta_TN.isnan().all()
    near(out.base_STN.double().sum(0), x.double() @ weight.double().T, 1e-5)


def test_error_of_fixed_point() -> None:
    """As `kernels.planes` says: bounded always, and on average, even with a channel 60 times the others."""
    target = Target(0, 32, 2048)
    made, batch, x = world([target], [{"signs": 1}], torch.float32), rows([1] * 4), activations(4, 2048, torch.float32)
    x[2:, 77] *= 60
    _, out = run(made, target, batch, x, TWO)
    assert out.delta_TN is not None
    matrix = made.matrix(1, target).double().to(DEVICE)
    expected = x.double() @ matrix.T
    error = (out.delta_TN.double() - expected).abs()
    bound = target.inputs * x.double().abs().amax(1)[:, None] / 65278 * matrix.abs().amax(1)
    assert (error <= bound * 1.001).all()
    share = error.square().mean(1).sqrt() / x.double().square().sum(1).sqrt() / matrix.square().mean().sqrt()
    assert (share[:2] <= 6e-5).all()
    assert (share[2:] <= 1.3 * (target.inputs / 12) ** 0.5 / 32639).all()


def test_another_variant_in_the_slot_is_seen() -> None:
    """A graph's next replay uses what the table then says, and nothing that was there before."""
    target = Target(0, 40, 260)
    made, batch = world([target], [{"signs": 1}, {"signs": 1}, {}], torch.float32), rows([1, 1])
    x = activations(2, 260, torch.float32)
    table, meaning = made.deltas.table_EJF, dict(made.meaning)
    rows_of = table.clone()
    for entry in (1, 2, 3, 1):
        table[1], made.meaning[1, 0] = rows_of[entry], meaning[entry, 0]
        for config in (FLAT, TWO, Config("unpack")):
            _, out = run(made, target, batch, x, config, kinds=Kinds(signs=True))
            assert out.delta_TN is not None
            near(out.delta_TN, x.double() @ made.matrix(1, target).double().to(DEVICE).T, 2e-3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter's mma is the one that is checked")
def test_self_check_on_the_device() -> None:
    checked = self_check(torch.device("cuda", torch.cuda.current_device()))
    assert checked.ok == native_b1(torch.cuda.get_device_capability()), checked.reason


@pytest.mark.skipif(DEVICE.type != "cpu", reason="breaks the interpreter's mma")
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("mma", lambda a, b, c: mma(a[..., ::-1], b, c)), ("byte_mma", lambda a, *rest: byte_mma(a[..., ::-1], *rest))],
)
def test_self_check_sees_wrong_fragments(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., np.ndarray]
) -> None:
    assert product_error(DEVICE, 4, 1, 4) <= TOLERANCE
    monkeypatch.setattr(f"tests.kernels.b1.{name}", wrong)
    assert not product_error(DEVICE, 4, 1, 4) <= 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_captured_linear_reads_tables_anew() -> None:
    target, dtype = Target(0, 512, 1024), torch.bfloat16
    made, x = world([target], [{"signs": 1}] * 3, dtype), activations(4, 1024, dtype)
    kinds, batch, other = made.kinds(), rows([1, 1, 2, 3]), rows([1, 2, 3, 3])
    weight = torch.randn(512, 1024, device=DEVICE).to(dtype)
    planes = Planes.empty(1, 4, 1024, DEVICE)
    out, workspace = partials_of(target, 4, kinds, dtype, DEVICE), torch.empty(0, dtype=torch.uint8, device=DEVICE)

    def step() -> None:
        prepare_planes(x, planes, target, made.deltas, batch.entry_T, kinds)
        delta_linear(
            x, planes, weight, target, made.deltas, batch.segments_G4, kinds, out, workspace
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    batch.entry_T.copy_(other.entry_T)
    batch.segments_G4.copy_(other.segments_G4)
    x.copy_(activations(4, 1024, dtype, seed=1))
    graph.replay()
    assert out.delta_TN is not None
    for entry, start, stop in other.segments:
        expected = x[start:stop].double() @ made.matrix(entry, target).double().to(DEVICE).T
        near(out.delta_TN[start:stop], expected, 2e-3)
    near(out.base_STN.double().sum(0), x.double() @ weight.double().T, 2e-2)
