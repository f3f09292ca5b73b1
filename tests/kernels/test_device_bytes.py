"""Low-rank factors of bytes, decode-sized and in prefill, against float64 of the integers themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.delta_linear import low_rank_choice, table_reference, wide
from kernels.delta_linear.device import delta_linear, partials_of
from kernels.delta_linear.low_rank_choice import LowRankConfig
from kernels.delta_linear.row_tiles import row_tiles, spans
from kernels.delta_linear.triton_bytes import _TO_BF16, _TO_FP16
from kernels.device import Field, Kinds, Target
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, POISON, Rows, Spec, World, poisoned, rows, world

FUSED = Target(1, 80, 72, (0, 48, 64))
SINGLE = Target(0, 40, 136)
SPECS: list[Spec] = [
    {"bytes": 16},
    {"rank": 20},
    {"bytes": 40},
    {},
    {"bytes": 72, "members": (1,)},
    {"signs": 1, "bytes": 5},
    {"rank": 4},
    {"bytes": 64, "dense": True},
    {"signs": 2, "rank": 16},
]
WITH_SIGNS: list[Spec] = [{"signs": 1, "bytes": 30}, {"signs": 1}]
BYTES_ALONE: list[Spec] = [{"bytes": 16}, {"bytes": 33}, {}, {"bytes": 70}]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest output: x A^T is rounded to the compute dtype"""


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beside_adapters(mix: str, dtype: torch.dtype) -> None:
    w = world([SINGLE, FUSED], SPECS, dtype)
    check(w, FUSED, rows(MIXES[mix], padding=2, spare_segments=1))


@pytest.mark.parametrize("batch", [[1], [1, 2, 4], [0, 2, 2, 2, 3], [4] * 21, [0, 0]], ids=str)
def test_alone(batch: list[int]) -> None:
    w = world([SINGLE, FUSED], BYTES_ALONE, DTYPES[1], seed=1)
    check(w, FUSED, rows(batch, padding=1, spare_segments=1))


@pytest.mark.parametrize(
    "target",
    [SINGLE, FUSED, Target(0, 17, 1408), Target(0, 33, 999), Target(0, 16, 1000), Target(1, 300, 8, (0, 16, 288))],
    ids=str,
)
def test_sizes(target: Target) -> None:
    """K in several parts, none of them whole; widths that 16 bytes do not divide."""
    w = world([SINGLE, target] if target.index else [target, FUSED], SPECS, DTYPES[0], seed=2)
    check(w, target, rows([1, 2, 3, 3, 5, 8]))


def test_ranks_from_16_to_640_in_one_batch() -> None:
    target = Target(0, 656, 648)
    specs = [{"bytes": rank} for rank in (3, 16, 100, 256, 640)]
    w = world([target], [*specs, {"rank": 512}], torch.float16, seed=3)
    check(w, target, rows([1, 2, 3, 3, 4, 5, 6]))
    check(w, target, rows([5]))


@pytest.mark.parametrize("split", [1, 2, 8])
def test_settings(split: int) -> None:
    w = world([SINGLE, FUSED], SPECS, DTYPES[1], seed=4)
    for block, outputs, ranks in ((16, 16, 16), (64, 128, 64), (32, 64, 32)):
        config = LowRankConfig(split, 16, block, 64, 2, 3, 2, outputs, 4, ranks)
        check(w, FUSED, rows([1] * 19 + [3, 5, 6]), config)


@pytest.mark.parametrize(
    ("source", "dtype"), [(_TO_BF16.value, torch.bfloat16), (_TO_FP16.value, torch.float16)], ids=["bf16", "fp16"]
)
def test_conversions_are_what_their_assembly_does(source: str, dtype: torch.dtype) -> None:
    """Every byte, instruction by instruction as the PTX ISA defines them: the interpreter runs no assembly."""
    values = np.arange(-128, 128, dtype=np.int8)
    words = run_ptx(source, values.view(np.uint32), dtype)
    found = torch.from_numpy(np.stack([words["$0"], words["$1"]], 1).view(np.int16).reshape(-1).copy()).view(dtype)
    assert found.tolist() == values.tolist()


def run_ptx(source: str, given: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Registers at the end, uint32; `given` is $2."""
    held = {"$2": given}
    for line in source.replace("{", "").replace("}", "").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, operands = line.split(None, 1)
        out, *names = (operand.strip() for operand in operands.split(","))
        inputs = [held[n] if n in held else np.full_like(given, int(n, 0)) for n in names]
        match op:
            case "mov.b32":
                held[out] = inputs[0]
            case "and.b32":
                held[out] = inputs[0] & inputs[1]
            case "xor.b32":
                held[out] = inputs[0] ^ inputs[1]
            case "prmt.b32":
                eight = np.concatenate([word.view(np.uint8).reshape(-1, 4) for word in inputs[:2]], 1)
                chosen = [eight[:, inputs[2][0] >> 4 * i & 7] for i in range(4)]
                held[out] = np.stack(chosen, 1).copy().view(np.uint32)[:, 0]
            case "fma.rn.bf16x2" | "add.rn.f16x2":
                numbers = [torch.from_numpy(word.view(np.int16).copy()).view(dtype).double() for word in inputs]
                exact = numbers[0] * numbers[1] + numbers[2] if op.startswith("fma") else numbers[0] + numbers[1]
                held[out] = exact.to(dtype).view(torch.int16).numpy().view(np.uint32)
            case _:
                raise AssertionError(f"not emulated: {line}")
    return held


def test_integers_are_exact() -> None:
    """One component, one input: scale * b * a of every pair, to the last bit that float32 has."""
    target = Target(0, 256, 256)
    w = world([target], [{"bytes": 1}], torch.float16, seed=5)
    x = torch.eye(256, device=DEVICE, dtype=torch.float16)
    d = table_reference.low_rank(w.deltas, target, 1, torch.float16)
    assert d is not None
    into = torch.zeros(256, 256, device=DEVICE)
    run(w, target, x, rows([1] * 256), into)
    scaled = (d / 127).half().double()  # what passes between the two is rounded
    assert ((into.double() - d.double().T).abs() <= 127 * scaled.T.abs() * 2.0**-10 + 1e-6).all()


@pytest.mark.parametrize("kinds", [Kinds(byte_rank=80), Kinds(rank=32), Kinds(byte_rank=80, rank=32)], ids=str)
def test_others_are_left_alone(kinds: Kinds) -> None:
    """Entries whose factors are of the kind that was not asked for add nothing."""
    w, batch = world([SINGLE, FUSED], SPECS, DTYPES[1], seed=6), rows([1, 2, 3, 7])
    x = torch.randn(4, FUSED.inputs, device=DEVICE).to(w.dtype)
    into = torch.zeros(4, FUSED.outputs, device=DEVICE)
    run(w, FUSED, x, batch, into, kinds=kinds)
    changed = (into != 0).any(1).tolist()
    assert changed == [kinds.byte_rank > 0, kinds.rank > 0, kinds.byte_rank > 0, kinds.rank > 0]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    w = world([SINGLE, FUSED], SPECS, torch.float16, seed=7)
    x = torch.randn(4, FUSED.inputs, device=DEVICE).to(torch.float16)
    alone, among = torch.zeros(4, 80, device=DEVICE), torch.zeros(4, 80, device=DEVICE)
    run(w, FUSED, x, rows([3] * 4), alone)
    run(w, FUSED, x, rows([1, 3, 5, 8]), among)
    assert torch.equal(alone[1], among[1])
    assert not torch.equal(alone[0], among[0])


def test_follows_a_table_that_changes() -> None:
    """A slot goes from an adapter to integers and back, between two replays of one graph."""
    w, batch = world([SINGLE, FUSED], SPECS, DTYPES[0], seed=8), rows([2, 2])
    for entry in (3, 2, 8, 4):
        w.deltas.table_EJF[2] = w.deltas.table_EJF[entry].clone()
        check(w, FUSED, batch, kinds=Kinds(rank=32, byte_rank=80))


def test_the_whole_linear() -> None:
    """With a base, signs and dense parts, over poisoned outputs."""
    w, batch = world([SINGLE, FUSED], SPECS, DTYPES[1], seed=9), rows([0, 1, 2, 3, 3, 8])
    kinds = Kinds(byte_rank=80, rank=32, dense=True)
    x = torch.randn(6, FUSED.inputs, device=DEVICE).to(w.dtype)
    weight = (torch.randn(FUSED.outputs, FUSED.inputs, device=DEVICE) * 0.05).to(w.dtype)
    out = partials_of(FUSED, 6, kinds, w.dtype, DEVICE)
    assert out.delta_TN is not None
    out.base_STN.fill_(float("nan"))
    out.delta_TN.fill_(float("nan"))
    space = wide.workspace_bytes(FUSED, 6, kinds, w.dtype)
    workspace = torch.full((space,), POISON, dtype=torch.uint8, device=DEVICE)
    delta_linear(x, None, weight, FUSED, w.deltas, batch.segments_G4, kinds, out, workspace)
    for entry, start, stop in batch.segments:
        d = table_reference.matrix(w.deltas, FUSED, entry, w.dtype)
        want = x[start:stop].double() @ d.double().T
        assert (out.delta_TN[start:stop] - want).abs().max() <= 4 * TOLERANCE[w.dtype]


@pytest.mark.parametrize("specs", [SPECS, BYTES_ALONE, WITH_SIGNS], ids=["all", "alone", "signs"])
@pytest.mark.parametrize("impl", ["split", "fused", "merge", "reference", None])
def test_prefill(specs: list[Spec], impl: wide.Impl | None) -> None:
    w = world([SINGLE, FUSED], specs, DTYPES[1], seed=10)
    entries = range(len(specs) + 1)
    segments, at = [], 0
    for entry, count in zip(entries, (3, 20, 1, 40, 2, 5, 1, 7, 17, 2), strict=False):
        segments.append((entry, at, at := at + count))
    prefill(w, FUSED, segments, impl)


def test_prefill_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the workspace holds x A^T of; a variant's rows in two spans."""
    monkeypatch.setattr(low_rank_choice, "BYTE_ROWS", 300)
    monkeypatch.setattr(low_rank_choice, "SPLIT_FLOATS", 1)
    w = world([SINGLE], BYTES_ALONE, DTYPES[1], seed=11)
    prefill(w, SINGLE, [(2, 0, 270), (0, 270, 300), (1, 300, 600), (4, 600, 609)], None)


def test_prefill_of_a_narrow_linear() -> None:
    """K in many parts, of which expand has few ranks at a time."""
    narrow = Target(0, 40, 2048)
    rule = low_rank_choice.byte_rule(narrow, 64, 1, 80, 64)
    assert low_rank_choice.expanded_ranks(rule, 80, 2) < min(rule.ranks, 80)
    w = world([narrow], [{"bytes": 33}, {}, {"bytes": 40}], DTYPES[1], seed=12)
    prefill(w, narrow, [(1, 0, 64)], None)
    prefill(w, narrow, [(3, 0, 50), (0, 50, 51), (1, 51, 64)], None)


def test_spans() -> None:
    tiles = [[1, 0, 256, 0], [1, 256, 290, 0], [2, 290, 300, 0], [3, 300, 556, 0], [3, 556, 560, 0]]
    assert list(spans(tiles, 300)) == [(slice(0, 3), (0, 300)), (slice(3, 5), (300, 560))]
    assert list(spans(tiles[:1], 300)) == [(slice(0, 1), (0, 256))]


def test_workspace_is_bounded_and_enough() -> None:
    """For every size up to what was planned; and planning for anything costs little."""
    qkv = Target(0, 12288, 4096, (0, 4096, 8192))
    for most, mib in ((64, 3), (1024, 48), (8192, 48)):
        planned = low_rank_choice.workspace_floats(qkv, most, 512, 4096)
        assert planned * 4 <= mib * 2**20
        for count in {1, 2, 3, 8, 33, 64, 200, 256, 1024} & set(range(most + 1)):
            for rank in (16, 64, 256, 2048, 4096):
                for segments in {1, 5, count}:
                    for config in low_rank_choice.byte_candidates(qkv, count, segments, rank):
                        assert config.split * count * 3 * rank <= planned


@given(
    st.sampled_from([64, 384, 768, 4096, 22016]),
    st.sampled_from([256, 768, 2048, 14336]),
    st.integers(1, 2048),
    st.integers(1, 64),
    st.integers(1, 64).map(lambda n: 16 * n),
)
def test_expand_fits_every_chip(outputs: int, inputs: int, rows: int, segments: int, rank: int) -> None:
    """x A^T in 64 KiB, of the 99 that some chips give a program: once for a product, twice where copies run ahead."""
    target, longest = Target(0, outputs, inputs), -(-rows // segments)
    of_bytes = low_rank_choice.byte_rule(target, rows, segments, rank, min(256, longest))
    of_words = low_rank_choice.choose(target, rows, rank, torch.device("cpu"))
    for config, buffers in ((of_bytes, 2), (of_words, 1)):
        ranks = low_rank_choice.expanded_ranks(config, rank, buffers)
        assert ranks >= 16
        assert 4 * buffers * config.split * config.rows * ranks <= 2**16


def check(
    w: World, target: Target, batch: Rows, config: LowRankConfig | None = None, kinds: Kinds | None = None
) -> None:
    count = batch.entry_T.shape[0]
    x = torch.randn(count, target.inputs, device=DEVICE).to(w.dtype)
    into = torch.randn(count, target.outputs + 3, device=DEVICE)
    want = into.double()
    for entry, start, stop in batch.segments:
        matrix = table_reference.low_rank(w.deltas, target, entry, w.dtype)
        if matrix is not None:
            want[start:stop, : target.outputs] += x[start:stop].double() @ matrix.double().T
    run(w, target, x, batch, into, config, kinds)
    assert (into - want).abs().max() <= TOLERANCE[w.dtype] * max(1.0, want.abs().max().item())
    empty = w.deltas.table_EJF[batch.entry_T.long(), target.index, Field.RANK] == 0
    assert torch.equal(into[empty], want[empty].float()), "rows without a low-rank part were touched"


def run(
    w: World,
    target: Target,
    x: torch.Tensor,
    batch: Rows,
    into: torch.Tensor,
    config: LowRankConfig | None = None,
    kinds: Kinds | None = None,
) -> None:
    kinds = kinds or w.kinds()
    size = 4 * low_rank_choice.workspace_floats(target, x.shape[0], kinds.rank, kinds.byte_rank)
    size *= config.split if config else 1  # settings that the rule would not choose for so little
    workspace = torch.full((size,), POISON, dtype=torch.uint8, device=DEVICE)
    wide.low_rank(
        x, target, w.deltas, batch.segments_G4, kinds.rank, into, workspace, byte_rank=kinds.byte_rank, config=config
    )


def prefill(w: World, target: Target, segments: list[tuple[int, int, int]], impl: wide.Impl | None) -> None:
    count, kinds = segments[-1][2], w.kinds()
    x = torch.randn(count, target.inputs, device=DEVICE).to(w.dtype)
    weight = (torch.randn(target.outputs, target.inputs, device=DEVICE) * 0.05).to(w.dtype)
    out = poisoned((count, target.outputs), w.dtype)
    space = wide.workspace_bytes(target, count, kinds, w.dtype)
    workspace = torch.full((space,), POISON, dtype=torch.uint8, device=DEVICE)
    tiles = torch.tensor(row_tiles(segments), dtype=torch.int32, device=DEVICE)
    wide.prefill_linear(x, weight, target, w.deltas, tiles, segments, kinds, out, workspace, impl=impl)
    for entry, start, stop in segments:
        d = table_reference.matrix(w.deltas, target, entry, w.dtype).double()
        want = x[start:stop].double() @ (weight.double() + d).T
        limit = 2 * TOLERANCE[w.dtype] * max(1.0, want.abs().max().item())
        assert (out[start:stop] - want).abs().max() <= limit, f"entry {entry}"
