"""Angles of every kind of rope, and the way from partial sums of q, k, v to the cache, against the specifications."""

from __future__ import annotations

import pytest
import torch

from bitdelta_core.models.rope import RopeConfig, inv_freq
from bitdelta_core.models.rope import cos_sin as cos_sin_reference
from kernels.device import Target
from kernels.rms_norm.reference import rms_norm
from kernels.rotary.device import RopeTables, Turn, cos_sin, rope_and_cache
from kernels.rotary.reference import rotary_
from tests.kernels.device_harness import DEVICE, DTYPES, MIXES, Rows, poisoned, rows, world
from tests.kernels.row_cases import random_partials, spoil_vectors, summed, vectors_of

EPS = 1e-6
ROPES: list[dict[str, object]] = [
    {"kind": "default", "theta": 10000.0},
    {"kind": "linear", "theta": 10000.0, "factor": 4.0},
    {"kind": "dynamic", "theta": 10000.0, "factor": 4.0},
    {"kind": "dynamic", "theta": 1e6, "factor": 1.0},
    {"kind": "llama3", "theta": 500000.0, "factor": 8.0, "original_positions": 64, "low_freq_factor": 1.0},
    {"kind": "yarn", "theta": 10000.0, "factor": 8.0, "original_positions": 64, "attention_factor": 1.21},
]


def config(settings: dict[str, object], dim: int, max_positions: int) -> RopeConfig:
    return RopeConfig(dim=dim, max_positions=max_positions, **settings)  # pyright: ignore[reportArgumentType]


def table_row(c: RopeConfig) -> torch.Tensor:
    dynamic = (c.factor, c.max_positions) if c.kind == "dynamic" else None
    return RopeTables.row(inv_freq(c, torch.device("cpu")), c.attention_factor, dynamic)


def run_cos_sin(
    configs: list[RopeConfig], entries: list[int], positions: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    tables = RopeTables.empty(len(configs) + 1, configs[0].dim, DEVICE)
    for e, c in enumerate(configs):
        tables.values_EF[e].copy_(table_row(c))
    cos, sin = (poisoned((len(positions), configs[0].dim // 2), torch.float32) for _ in range(2))
    ints = [torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in (positions, entries)]
    cos_sin(ints[0], ints[1], tables, cos, sin)
    return cos, sin


@pytest.mark.parametrize("dim", [8, 64, 80])
def test_cos_sin(dim: int) -> None:
    """Every kind in one step, positions within and beyond max_position_embeddings.

    float32 powers that are off by 4e-7 turn position 2047 by 1e-3 radians."""
    positions, configs = [0, 1, 63, 64, 99, 127, 128, 400, 2047, 0], [config(s, dim, 128) for s in ROPES]
    for first in range(len(ROPES)):
        entries = [(first + i) % len(ROPES) for i in range(len(positions))]
        expected = cos_sin_reference(tuple(configs), torch.tensor(entries), torch.tensor(positions))
        for actual, wide in zip(run_cos_sin(configs, entries, positions), expected, strict=True):
            torch.testing.assert_close(actual.cpu(), wide[:, : dim // 2], rtol=0, atol=1e-3)


def test_dynamic_is_default_within_the_trained_length() -> None:
    plain, dynamic = config(ROPES[0], 64, 128), config(ROPES[2], 64, 128)
    cos, sin = run_cos_sin([plain, dynamic], [0, 1, 0, 1], [100, 100, 127, 127])
    assert torch.equal(cos[0::2], cos[1::2])
    assert torch.equal(sin[0::2], sin[1::2])


def test_far_positions() -> None:
    """As exact as float32 angles are, which is what transformers takes the cosine of."""
    c, positions = config(ROPES[0], 128, 2**20), [4095, 32767, 131071, 524287]
    cos, sin = run_cos_sin([c], [0] * 4, positions)
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * inv_freq(c, torch.device("cpu"))
    torch.testing.assert_close(cos.cpu(), angles.double().cos().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.cpu(), angles.double().sin().float(), rtol=0, atol=1e-6)


def test_an_entry_that_was_never_set_gives_nan() -> None:
    cos, sin = run_cos_sin([config(ROPES[0], 16, 128)], [0, 1], [3, 3])
    assert cos[0].isfinite().all()
    assert cos[1].isnan().all()
    assert sin[1].isnan().all()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixes(mix: str, dtype: torch.dtype) -> None:
    check(16, (4, 2), rows(MIXES[mix], padding=2), dtype, split=2, bias=True, norm=True)


@pytest.mark.parametrize(
    ("dim", "heads"), [(64, (4, 4)), (80, (3, 1)), (96, (5, 1)), (128, (8, 2)), (256, (2, 1))], ids=str
)
@pytest.mark.parametrize("norm", [False, True])
def test_head_sizes(dim: int, heads: tuple[int, int], norm: bool) -> None:
    check(dim, heads, rows([0, 1, 2], padding=1), DTYPES[1], split=1, norm=norm)


@pytest.mark.parametrize(("split", "bias", "delta"), [(1, True, True), (3, False, False), (3, True, True)])
def test_forms(split: int, bias: bool, delta: bool) -> None:
    check(32, (6, 2), rows([0, 1, 1, 2]), DTYPES[0], split=split, bias=bias, delta=delta)


def test_a_bad_row_spoils_no_other() -> None:
    """NaN in one row, and in everything of a variant that no row has."""
    check(32, (4, 2), rows([1, 1, 3]), DTYPES[0], split=1, bias=True, norm=True, bad_row=1, bad_entry=2)


def check(
    dim: int, heads: tuple[int, int], batch: Rows, dtype: torch.dtype, *, split: int, bias: bool = False,
    norm: bool = False, delta: bool = True, bad_row: int | None = None, bad_entry: int | None = None,
) -> None:  # fmt: skip
    gen, (q, kv), count = torch.Generator().manual_seed(dim), heads, batch.entry_T.shape[0]
    total, block_size, blocks = q + 2 * kv, 16, 5
    made = world([Target(0, 16, 8)], [{}] * 10, dtype, vectors=(total + 2) * dim + 3)
    if bad_entry is not None:
        spoil_vectors(made, bad_entry)
    partials = random_partials(split, batch, total * dim, dtype, gen, delta=delta)
    if bad_row is not None:
        partials.base_STN[:, bad_row] = torch.nan
    angles = torch.rand(count, dim // 2, generator=gen).to(DEVICE) * 6
    real = len(batch.entries)
    slots = [*(torch.randperm((blocks - 1) * block_size, generator=gen)[:real] + block_size), *[0] * (count - real)]
    slots_T = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    bias_span = (3, total * dim + 3) if bias else None
    norms = ((total * dim + 3, (total + 1) * dim + 3), ((total + 1) * dim + 3, (total + 2) * dim + 3))
    spans = (bias_span, *norms) if norm else (bias_span, None, None)
    q_out, cache = poisoned((count, q, dim), dtype), poisoned((blocks, 2, kv, block_size, dim), dtype)
    turn = Turn(partials, spans, EPS, angles.cos(), angles.sin(), slots_T)
    rope_and_cache(turn, made.deltas, batch.entry_T, q_out, cache)

    qkv = summed(partials, batch)
    if bias_span:
        qkv += vectors_of(made, batch.entry_T, bias_span)
    qkv_THD = qkv.view(count, total, dim)
    if norm:
        weights = [vectors_of(made, batch.entry_T, span)[:, None] for span in norms]
        qkv_THD[:, :q] = rms_norm(qkv_THD[:, :q], weights[0], EPS)
        qkv_THD[:, q : q + kv] = rms_norm(qkv_THD[:, q : q + kv], weights[1], EPS)
    rotary_(qkv_THD[:, : q + kv], torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1))
    good = torch.tensor([row for row in range(count) if row != bad_row], device=DEVICE)
    close = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(q_out[good].float(), qkv_THD[good, :q], **close)
    slots_T = slots_T.long()
    written = cache.transpose(2, 3)[slots_T // block_size, :, slots_T % block_size]  # T, 2, G, D
    used = good[good < real]
    torch.testing.assert_close(written[used].flatten(1, 2).float(), qkv_THD[used, q:], **close)
    cache.transpose(2, 3)[slots_T // block_size, :, slots_T % block_size] = torch.nan
    assert cache.isnan().all(), "a slot that is no row's was written"
