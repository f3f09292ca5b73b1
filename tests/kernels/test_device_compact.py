"""Decode-sized linears with kept values alone against float64: popularity mixes, odd shapes, poisoned surroundings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.delta_linear import compact as ops
from kernels.delta_linear import table_reference, wide
from kernels.delta_linear.choice import Config
from kernels.delta_linear.compact import CompactConfig
from kernels.delta_linear.compact_check import TOLERANCE, compact_error
from kernels.delta_linear.device import delta_linear
from kernels.delta_linear.row_tiles import row_tiles
from kernels.delta_linear.triton_compact import _TRADE
from kernels.device import Kinds, Partials, Planes, Target
from kernels.kept import Form
from kernels.planes import prepare_planes
from tests.kernels import b1
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, POISON, Rows, World, poisoned, rows, world

SHARE = 2e-3
"""Of a product's root mean square that its error may be: x in 16 bits, or its own products in float32"""
B1 = {1: CompactConfig(tiles=1, warps=4), 4: CompactConfig(tiles=4, warps=4), 2: CompactConfig(tiles=2, warps=2)}
UNPACK = CompactConfig("unpack")
TALL, SHORT = Form(2, 16, 4, 64), Form(2, 16, 4, 16)
KEEPING = [{"kept": TALL}, {"kept": TALL}, {}, *[{"kept": TALL}] * 6]


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with b1.emulated():
        yield


def activations(count: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=gen) * torch.logspace(-1, 1, count)[:, None]
    return x.to(dtype).to(DEVICE)


def near(actual: torch.Tensor, expected: torch.Tensor, share: float = SHARE) -> None:
    """Within a share of the expected values' root mean square; NaN never is."""
    assert (actual.double() - expected).abs().max() <= share * expected.square().mean().sqrt()


def check(
    made: World, target: Target, batch: Rows, x: torch.Tensor, config: CompactConfig, *, add: bool = False,
    width: int | None = None, kinds: Kinds | None = None,
) -> torch.Tensor:  # fmt: skip
    """Every row of every segment against float64, and that no other row is touched."""
    out = poisoned((len(x), width or target.outputs), torch.float32)
    before = torch.zeros_like(out)
    if add:
        before = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        for _, start, stop in batch.segments:
            out[start:stop] = before[start:stop]
    kinds = kinds or made.kinds()
    ops.compact(x, target, made.deltas, batch.segments_G4, kinds, out, add=add, config=config)
    covered = torch.zeros(len(x), dtype=torch.bool)
    for entry, start, stop in batch.segments:
        covered[start:stop] = True
        matrix = made.matrix(entry, target).double().to(DEVICE)
        expected = x[start:stop].double() @ matrix.T
        for row, wanted, old in zip(out[start:stop], expected, before[start:stop].double(), strict=True):
            near(row[: len(wanted)], wanted + old[: len(wanted)])
            assert torch.equal(row[len(wanted) :].double(), old[len(wanted) :])
    assert out[~covered.to(DEVICE)].isnan().all(), "rows of the base are left alone"
    return out


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize(
    ("config", "dtype"), [(B1[4], DTYPES[0]), (B1[1], DTYPES[1]), (UNPACK, DTYPES[1])], ids=["4", "1", "unpack"]
)
def test_mixes(mix: str, add: bool, config: CompactConfig, dtype: torch.dtype) -> None:
    target = Target(1, 200, 300)
    made = world([Target(0, 16, 8), target], KEEPING, dtype)
    batch = rows(MIXES[mix], padding=2, spare_segments=2)
    check(made, target, batch, activations(len(batch.entry_T), 300, dtype), config, add=add, kinds=made.kinds())


FORMS = [
    Form(1, 8, 1, 64), Form(1, 2, 2, 64), Form(2, 256, 16, 64), Form(2, 8, 1, 64), Form(4, 64, 8, 64),
    Form(4, 2, 2, 64), Form(2, 128, 32, 64),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms(form: Form) -> None:
    """One tile column and several; inputs that fill no group; outputs that fill no mask block."""
    for (outputs, inputs), config in (((72, 700), B1[4]), ((50, 33), B1[2]), ((130, 290), B1[1]), ((50, 290), UNPACK)):
        target = Target(0, outputs, inputs)
        made = world([target], [{"kept": form}] * 2, DTYPES[0], seed=outputs)
        check(made, target, rows([1, 2, 2]), activations(3, inputs, DTYPES[0]), config)


@pytest.mark.parametrize("config", [B1[1], UNPACK], ids=lambda c: c.impl)
def test_variants_of_other_forms_in_one_batch(config: CompactConfig) -> None:
    """Bits, groups and masks are each variant's own; kernels take the most bits and the shortest masks of any."""
    target = Target(0, 90, 600, (0, 64))
    made = world([target], [{"kept": f} for f in (*FORMS, SHORT, Form(1, 128, 8, 16))], DTYPES[0])
    assert (made.kinds().compact, made.kinds().tall) == (4, False)
    check(made, target, rows([*range(1, 10), 3, 3, 8, 0]), activations(13, 600, DTYPES[0]), config)


@pytest.mark.parametrize("lengths", [[1], [3], [2, 1, 9]], ids=str)
def test_segments_of_every_length(lengths: list[int]) -> None:
    target = Target(0, 80, 2100)
    made = world([target], [{"kept": TALL}] * len(lengths), DTYPES[0])
    batch = rows([entry for entry, n in enumerate(lengths, start=1) for _ in range(n)])
    check(made, target, batch, activations(sum(lengths), 2100, DTYPES[0]), B1[4])


def test_settings_do_not_change_a_bit() -> None:
    target = Target(0, 130, 1100)
    made, batch = world([target], [{"kept": TALL}] * 3, DTYPES[0]), rows([1, 2, 2, 3])
    x = activations(4, 1100, DTYPES[0])
    settings = [*B1.values(), replace(B1[4], warps=1), replace(B1[2], resident=1), replace(B1[1], warps=8)]
    first, *others = [check(made, target, batch, x, config) for config in settings]
    for other in others:
        assert torch.equal(first, other)


def test_larger_outputs_of_their_own() -> None:
    """Columns up to each variant's own number of outputs; zeros from there on."""
    target = Target(0, 40, 260)
    made = world([target], [{"kept": TALL, "extra": 30}, {"kept": TALL}, {}], DTYPES[0])
    for config in (B1[4], B1[1], UNPACK):
        check(made, target, rows([1, 2, 3]), activations(3, 260, DTYPES[0]), config, width=90)


def test_other_variants_are_never_read() -> None:
    """Not one byte of theirs: they are NaN, and so are the rows of x that are not a segment's."""
    target = Target(0, 130, 520)
    made, batch = world([target], [{"kept": TALL}] * 3, DTYPES[0]), rows([2, 2, 0, 0])
    x = activations(4, 520, DTYPES[0])
    x[:2] = torch.nan  # the base's
    whole = check(made, target, batch, x, B1[4])
    own = made.deltas.table_EJF[2, 0].tolist()
    slab = torch.full_like(made.deltas.slab, POISON)
    for field, size in ((13, 130 // 16 + 1), (14, 0)):
        begin = own[field] * 256
        nbytes = size * 2 * 512 if size else 9 * 64 + 3 * 256
        slab[begin : begin + nbytes] = made.deltas.slab[begin : begin + nbytes]
    made.deltas = replace(made.deltas, slab=slab)
    assert torch.equal(check(made, target, batch, x, B1[4])[2:], whole[2:])


def test_another_variant_in_the_slot_is_seen() -> None:
    """A graph's next replay uses what the table then says, and nothing that was there before."""
    target = Target(0, 70, 260)
    made, batch = world([target], [{"kept": TALL}, {"kept": Form(1, 8, 1, 64)}, {}], DTYPES[0]), rows([1, 1])
    table, meaning, kinds = made.deltas.table_EJF, dict(made.meaning), made.kinds()
    rows_of = table.clone()
    for entry in (1, 2, 3, 1):
        table[1], made.meaning[1, 0] = rows_of[entry], meaning[entry, 0]
        for config in (B1[4], UNPACK):
            check(made, target, batch, activations(2, 260, DTYPES[0]), config, kinds=kinds)


def test_the_table_says_what_is_meant() -> None:
    target = Target(0, 150, 333)
    made = world([target], [{"kept": form} for form in (*FORMS, SHORT)], DTYPES[0])
    for entry in range(1, len(FORMS) + 2):
        found = table_reference.matrix(made.deltas, target, entry, DTYPES[0]).cpu()
        torch.testing.assert_close(found, made.matrix(entry, target), rtol=1e-6, atol=0)


def test_an_outlier_costs_its_own_inputs_precision_alone() -> None:
    """Each 256 kept inputs have a scale of their own, and one channel 60 times the others is bounded as always."""
    target = Target(0, 64, 4096)
    made, x = world([target], [{"kept": Form(2, 16, 2, 64)}], torch.float32), activations(2, 4096, torch.float32)
    x[:, 77] *= 60
    check(made, target, rows([1, 1]), x, B1[4])


LINEARS = [
    ("compact alone", [{"kept": TALL}, {}, {"kept": TALL}]),
    ("beside signs", [{"kept": TALL}, {"signs": 1}, {"signs": 2}]),
    ("all", [{"kept": TALL, "signs": 1, "rank": 8}, {"rank": 4}, {"kept": SHORT, "dense": True}]),
]


@pytest.mark.parametrize(("name", "specs"), LINEARS, ids=[name for name, _ in LINEARS])
@pytest.mark.parametrize("impl", ["flat", "unpack"])
def test_whole_linears(name: str, specs: list[dict], impl: str) -> None:
    """In whatever company, and whoever writes the delta first."""
    dtype, target = torch.float32 if DEVICE.type == "cpu" else DTYPES[0], Target(0, 58, 260, (0, 16, 48))
    made, batch = world([target], specs, dtype), rows([1, 2, 2, 3, 0], padding=1)
    kinds, x = made.kinds(), activations(6, 260, dtype)
    config = Config("flat", inner=32, stages=2, depth=2) if impl == "flat" else Config("unpack")
    weight = (torch.randn(58, 260, generator=torch.Generator().manual_seed(9)) * 0.05).to(x)
    planes = Planes.empty(kinds.sets(target), 6, 260, DEVICE) if kinds.signs else None
    if planes is not None:
        prepare_planes(x, planes, target, made.deltas, batch.entry_T, kinds)
    split = config.split(target, 58, DEVICE)
    out = Partials(poisoned((split, 6, 58), config.base_dtype(dtype)), poisoned((6, 58), torch.float32))
    room = wide.workspace_bytes(target, 6, kinds, dtype)
    delta_linear(
        x, planes, weight, target, made.deltas, batch.segments_G4, kinds, out,
        torch.empty(room, dtype=torch.uint8, device=DEVICE), config=config,
    )  # fmt: skip
    assert out.delta_TN is not None
    for entry, start, stop in batch.segments:
        expected = x[start:stop].double() @ made.matrix(entry, target).double().to(DEVICE).T
        for row, wanted in zip(out.delta_TN[start:stop], expected, strict=True):
            near(row, wanted, SHARE if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("counts", [[5, 3], [1, 40]], ids=str)
def test_prefill_merges(counts: list[int]) -> None:
    target, dtype = Target(0, 150, 300, (0, 64)), DTYPES[0]
    made = world([target], [{"kept": TALL}, {"kept": SHORT, "signs": 1}], dtype)
    segments = [(0, 0, 2), (1, 2, 2 + counts[0]), (2, 2 + counts[0], 2 + sum(counts))]
    x = activations(2 + sum(counts), 300, dtype)
    weight = (torch.randn(150, 300, generator=torch.Generator().manual_seed(9)) * 0.05).to(x)
    out, kinds = poisoned((len(x), 150), dtype), made.kinds()
    tiles = torch.tensor(row_tiles(segments), dtype=torch.int32, device=DEVICE)
    room = torch.empty(wide.workspace_bytes(target, len(x), kinds, dtype), dtype=torch.uint8, device=DEVICE)
    way = wide.Way(slice_bytes=64 * 300 * dtype.itemsize)
    wide.prefill_linear(x, weight, target, made.deltas, tiles, segments, kinds, out, room, way=way)
    for entry, start, stop in segments:
        merged = weight.double() + (made.matrix(entry, target).double().to(DEVICE) if entry else 0)
        near(out[start:stop], x[start:stop].double() @ merged.T, {torch.bfloat16: 3e-2}.get(dtype, 3e-3))


def test_trading_is_what_its_assembly_does() -> None:
    """Instruction by instruction, as the PTX ISA defines them: the emulation elsewhere is of its meaning."""
    words = np.random.default_rng(0).integers(0, 2**32, (8, 4, 4), dtype=np.uint32)
    assert (_run_ptx(_TRADE.value, words) == b1.trade(words)).all()


def _run_ptx(source: str, words: np.ndarray) -> np.ndarray:
    lanes = np.arange(32)
    held = {f"${4 + i}": words[..., i].reshape(32).astype(np.uint64) for i in range(4)}
    held["%laneid"] = lanes.astype(np.uint64)

    def value(name: str) -> np.ndarray:
        return held[name] if name in held else np.full(32, int(name, 0) & 0xFFFFFFFF, dtype=np.uint64)

    for line in source.replace("{", "").replace("}", "").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, operands = line.split(None, 1)
        out, *inputs = (operand.strip() for operand in operands.split(","))
        a = value(inputs[0])
        match op.split(".")[0]:
            case "mov":
                held[out] = a
            case "and":
                held[out] = a & value(inputs[1])
            case "setp":
                held[out] = a != value(inputs[1])
            case "selp":
                held[out] = np.where(held[inputs[2]], a, value(inputs[1]))
            case "shfl":
                held[out] = a[lanes ^ int(inputs[1])]
            case "prmt":
                held[out] = _prmt(a, value(inputs[1]), value(inputs[2]))
            case _:
                raise AssertionError(f"not emulated: {line}")
    return np.stack([held[f"${i}"].astype(np.uint32) for i in range(4)], 1).reshape(8, 4, 4)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both, out = a | b << np.uint64(32), np.zeros(32, np.uint64)
    for i in range(4):
        byte = selector >> np.uint64(4 * i) & np.uint64(7)
        out |= (both >> byte * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return out


@pytest.mark.skipif(DEVICE.type != "cpu", reason="breaks the interpreter's mma")
def test_the_check_sees_wrong_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compact_error(DEVICE, 2, 4) <= TOLERANCE
    monkeypatch.setattr("tests.kernels.b1.trade", lambda words: words[..., ::-1])
    assert not compact_error(DEVICE, 2, 4) <= 1e-2
