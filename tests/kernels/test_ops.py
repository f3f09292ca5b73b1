"""Every op against its float32 reference: odd sizes, popularity mixes, NaN in whatever must not be read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from kernels.delta_linear import choose, delta_linear_, torch_digits
from kernels.delta_linear.reference import matrix
from kernels.deltas import DenseDelta, Int8Delta, LinearDelta, LowRankDelta, Placed, QuantDelta, RowsDelta, SignDelta
from kernels.embedding import embedding
from kernels.embedding.reference import merged
from kernels.paged_attention import AttentionPlan, paged_attention
from kernels.rms_norm import rms_norm
from kernels.rotary import rotary_, signed_sin
from kernels.segments import Segment, check_segments

MIXES = ("distinct", "identical", "uniform", "zipf", "base")
VARIANTS = 5


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills what `empty` gives with NaN while deterministic algorithms are on."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(sum(request.node.name.encode()))


def random_segments(mix: str, rows: int, generator: torch.Generator) -> tuple[Segment, ...]:
    """Segments that tile `rows` rows, slots in rising order, one segment per slot."""
    match mix:
        case "distinct":
            slots = torch.arange(rows) % (VARIANTS + 1) - 1
        case "identical":
            slots = torch.zeros(rows, dtype=torch.int64)
        case "base":
            slots = -torch.ones(rows, dtype=torch.int64)
        case "uniform":
            slots = torch.randint(-1, VARIANTS, (rows,), generator=generator)
        case _:
            weights = 1.0 / torch.arange(1, VARIANTS + 2) ** 1.5
            slots = torch.multinomial(weights, rows, replacement=True, generator=generator) - 1
    used, counts = slots.unique(return_counts=True)
    stops = counts.cumsum(0).tolist()
    segments = tuple(
        Segment(s, stop - n, stop) for s, n, stop in zip(used.tolist(), counts.tolist(), stops, strict=True)
    )
    check_segments(segments, rows)
    return segments


def random_delta(
    kind: str, n: int, k: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> LinearDelta:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    match kind:
        case "sign":
            return SignDelta(bytes_(1, n, -(-k // 8)), normal(1, n).abs(), None, k)
        case "sign-col-2":
            return SignDelta(bytes_(2, n, -(-k // 8)), normal(2, n).abs(), normal(2, k).abs(), k)
        case "int8" | "int8-3":
            planes = 3 if kind == "int8-3" else 1
            return Int8Delta(bytes_(planes, n, k).view(torch.int8), normal(planes, n).to(dtype), None)
        case "int8-col":
            return Int8Delta(bytes_(2, n, k).view(torch.int8), normal(2, n).to(dtype), normal(2, k).to(dtype))
        case "lowrank":
            return LowRankDelta(normal(3, k).to(dtype), normal(n, 3).to(dtype))
        case "dense":
            return DenseDelta(normal(n, k).to(dtype))
        case "rows":
            index = torch.randperm(n, generator=generator)[: n // 3 + 1].sort().values
            return RowsDelta(index, normal(len(index), k).to(dtype))
        case _:
            bits = int(kind.removeprefix("quant"))
            return QuantDelta(bytes_(n, -(-k * bits // 8)), normal(n).abs(), bits, k)


KINDS = ("sign", "sign-col-2", "int8", "int8-3", "int8-col", "lowrank", "dense", "quant2", "quant4", "quant8", "rows")


def expected_linear(
    y_TN: torch.Tensor, x_TK: torch.Tensor, deltas: dict[int, tuple[Placed, ...]], segments: tuple[Segment, ...]
) -> torch.Tensor:
    """In float64, from the reference matrices."""
    y = y_TN.double().clone()
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        for start, delta in deltas.get(segment.slot, ()):
            if isinstance(delta, RowsDelta):
                y[rows, delta.index_R + start] = x_TK[rows].double() @ delta.value_RK.double().T
            else:
                product = x_TK[rows].double() @ matrix(delta).double().T
                y[rows, start : start + product.shape[1]] += product
    return y


def assert_near(actual: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Within a share of the expected values' root mean square; NaN never is."""
    assert (actual.double() - expected).abs().max() <= share * expected.square().mean().sqrt()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size", [(1, 33, 7), (3, 64, 65), (63, 100, 31), (100, 24, 40)], ids=lambda size: "T{}-K{}-N{}".format(*size)
)
def test_delta_linear(mix: str, kind: str, size: tuple[int, int, int], generator: torch.Generator) -> None:
    t, k, n = size
    segments = random_segments(mix, t, generator)
    deltas: dict[int, tuple[Placed, ...]] = {
        slot: ((2, random_delta(kind, n, k, generator)),) for slot in range(VARIANTS) if slot != 3
    }
    y, x = torch.randn(t, n + 5, generator=generator), torch.randn(t, k, generator=generator)
    expected = expected_linear(y, x, deltas, segments)
    delta_linear_(y, x, deltas, segments)
    assert_near(y, expected, 1e-5)


OF_BYTES, OF_ALL = ("digits", "int8pack"), ("dense", "reference")
"""Implementations"""
KINDS_OF_BYTES = ("int8", "int8-3", "int8-col")


@pytest.mark.parametrize(
    ("impl", "kind"),
    [*product(OF_BYTES, KINDS_OF_BYTES), *product(OF_ALL, (*KINDS_OF_BYTES, "sign", "quant4"))],
)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_implementations_agree(impl: str, kind: str, rows: int, generator: torch.Generator) -> None:
    if impl == "digits" and not torch_digits.available():
        pytest.skip("this CPU does not multiply bytes")
    dtype = torch.bfloat16 if impl == "int8pack" else torch.float32
    delta = random_delta(kind, 33, 96, generator, dtype)
    x = (torch.randn(rows, 96, generator=generator) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    y, segments = torch.zeros(rows, 33, dtype=dtype), (Segment(0, 0, rows),)
    delta_linear_(y, x, {0: ((0, delta),)}, segments, impl=impl)  # pyright: ignore[reportArgumentType]
    expected = expected_linear(torch.zeros(rows, 33), x, {0: ((0, delta),)}, segments)
    for row in range(rows):
        assert_near(y[row], expected[row], 0.03 if dtype == torch.bfloat16 else 2e-5)


def test_digits_keep_bad_rows_to_themselves(generator: torch.Generator) -> None:
    if not torch_digits.available():
        pytest.skip("this CPU does not multiply bytes")
    delta = random_delta("int8", 9, 32, generator)
    x = torch.randn(4, 32, generator=generator)
    x[1], x[2, 3] = 0, torch.nan
    y = torch.zeros(4, 9)
    delta_linear_(y, x, {0: ((0, delta),)}, (Segment(0, 0, 4),), impl="digits")
    assert y[2].isnan().all()
    assert (y[1] == 0).all()
    assert_near(y[[0, 3]], x[[0, 3]].double() @ matrix(delta).double().T, 1e-5)


def test_dispatch_has_a_reason_for_each_choice(generator: torch.Generator) -> None:
    small, column = random_delta("int8", 8, 32, generator), random_delta("int8-col", 8, 32, generator)
    exact = "digits" if torch_digits.available() else "dense"
    assert choose(torch.empty(8, 32), small, 1) == "dense"
    assert choose(torch.empty(8, 32), small, 2) == exact
    assert choose(torch.empty(8, 32), column, 2) == exact
    assert choose(torch.empty(9, 32), column, 2) == "dense"
    large = Int8Delta(torch.empty(1, 2**14, 32, dtype=torch.int8), torch.empty(1, 2**14), None)
    assert choose(torch.empty(64, 32), large) == exact
    assert choose(torch.empty(65, 32), large) == "dense"
    assert choose(torch.empty(8, 32, dtype=torch.bfloat16), column) == "int8pack"
    assert choose(torch.empty(9, 32, dtype=torch.bfloat16), small) == "dense"
    assert choose(torch.empty(1, 36, dtype=torch.bfloat16), small) == "dense"
    assert choose(torch.empty(1, 32), random_delta("sign", 8, 32, generator), 4) == "dense"


@pytest.mark.parametrize("kind", ["int8-3", "int8-col"])
def test_digits_across_segments(kind: str, generator: torch.Generator) -> None:
    """Runs that a base segment or another shape interrupts, unequal segments, members of a fused linear."""
    if not torch_digits.available():
        pytest.skip("this CPU does not multiply bytes")
    deltas: dict[int, tuple[Placed, ...]] = {
        slot: (
            (1, random_delta(kind, 9 if slot == 2 else 7, 33, generator)),
            (20, random_delta("int8", 5, 33, generator)),
        )
        for slot in (0, 1, 2, 4)
    }
    stops = [3, 4, 6, 9, 10, 14]
    segments = tuple(Segment(i - 1, a, b) for i, (a, b) in enumerate(zip([0, *stops], stops, strict=False)))
    y, x = torch.randn(14, 25, generator=generator), torch.randn(14, 33, generator=generator)
    expected = expected_linear(y, x, deltas, segments)
    delta_linear_(y, x, deltas, segments, impl="digits")
    assert_near(y, expected, 1e-5)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_embedding(mix: str, kind: str, generator: torch.Generator) -> None:
    vocabulary, grown, k, t = 37, 41, 20, 63
    segments = random_segments(mix, t, generator)
    weight = torch.randn(vocabulary, k, generator=generator)
    deltas: dict[int, tuple[Placed, ...]] = {}
    for slot in range(VARIANTS):
        added = RowsDelta(torch.arange(vocabulary, grown), torch.randn(grown - vocabulary, k, generator=generator))
        deltas[slot] = ((0, added), (0, random_delta(kind, vocabulary, k, generator)))
    ids = torch.randint(0, vocabulary, (t,), generator=generator)
    for segment in segments:
        if segment.slot >= 0:
            ids[segment.stop - 1] = grown - 1
    expected = torch.cat([merged(weight, deltas.get(s.slot, ()))[ids[s.start : s.stop]] for s in segments])
    torch.testing.assert_close(embedding(ids, weight, deltas, segments), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(embedding(ids, weight, deltas, segments, impl="reference"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_rms_norm_and_rotary(dtype: torch.dtype, per_row: bool, generator: torch.Generator) -> None:
    x = torch.randn(7, 3, 10, generator=generator).to(dtype)
    weight = torch.randn((7, 1, 10) if per_row else (10,), generator=generator).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    expected = rms_norm(x, weight, 1e-5, impl="reference")
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, **tolerance)
    angles = torch.randn(7, 5, generator=generator).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), signed_sin(angles.sin()).to(dtype)
    turned = x.clone()
    rotary_(turned, cos, sin, impl="reference")
    rotary_(x, cos, sin)
    torch.testing.assert_close(x, turned, **tolerance)


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids="H{}".format)
@pytest.mark.parametrize(
    "work",
    [[(1, 9)], [(1, 1), (1, 30), (1, 400)], [(7, 7)], [(3, 12), (1, 5), (9, 9), (1, 270), (2, 2)]],
    ids=["decode", "decode-lengths", "prompt", "mixed"],
)
def test_paged_attention(
    work: list[tuple[int, int]], heads: tuple[int, int], window: int | None, generator: torch.Generator
) -> None:
    """Against attention over each sequence's own contiguous keys; every other slot of the cache is NaN."""
    (h, g), block, dim = heads, 3, 8
    needed = [-(-context // block) for _, context in work]
    free = (torch.randperm(sum(needed) + 3, generator=generator) + 1).tolist()
    cache = torch.full(((len(free) + 1) * block, 2, g, dim), torch.nan)
    table = torch.zeros((len(work), max(needed) + 1), dtype=torch.int32)
    q = torch.randn(sum(rows for rows, _ in work), h, dim, generator=generator)
    starts, expected = [0], []
    for s, (rows, context) in enumerate(work):
        blocks = [free.pop() for _ in range(needed[s])]
        table[s, : len(blocks)] = torch.tensor(blocks)
        kv = torch.randn(context, 2, g, dim, generator=generator)
        cache[[blocks[i // block] * block + i % block for i in range(context)]] = kv
        keys, values = kv.double().repeat_interleave(h // g, dim=2).unbind(1)
        for i in range(rows):
            at = context - rows + i
            first = 0 if window is None else max(at + 1 - window, 0)
            scores = torch.einsum("hd,lhd->hl", q[starts[-1] + i].double(), keys[first : at + 1]) * dim**-0.5
            expected.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), values[first : at + 1]).flatten())
        starts.append(starts[-1] + rows)
    plan = AttentionPlan.build(starts, [context for _, context in work], table, block, window)
    for impl in ("sdpa", "reference"):
        out = paged_attention(q, cache, plan, impl=impl)
        torch.testing.assert_close(out.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
