"""Decode and prefill attention over the paged cache, against the reference. Whatever must not be read is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from kernels.device import DeviceDeltas, Kinds, Target
from kernels.paged_attention import AttentionPlan, paged_attention
from kernels.paged_attention.choice import (
    Chip,
    DecodeConfig,
    PrefillConfig,
    decode_candidates,
    decode_refinements,
    decode_rule,
    prefill_candidates,
    prefill_rule,
    splits_of,
)
from kernels.paged_attention.device import Workspace, decode, prefill, workspace_bytes
from kernels.planes import planes_reference, values
from kernels.rotary.device import Turn, rope_and_cache
from tests.kernels.device_harness import DEVICE, DTYPES, poisoned, rows, world
from tests.kernels.row_cases import random_partials
from tests.kernels.test_device_planes import poisoned_planes

HEADS = {"3/3 16": ((3, 3), 16), "8/2 80": ((8, 2), 80), "7/1 8": ((7, 1), 8), "8/1 40": ((8, 1), 40)}
CONFIG = DecodeConfig(tile=16, chunk=32, splits=4, programs=3, warps=4, stages=2)
"""Contexts of 128 tokens have all splits; 3 programs take turns."""
NO_DELTAS = DeviceDeltas(*(torch.empty(0, device=DEVICE) for _ in range(3)))


@dataclass
class Problem:
    """Sequences whose tokens lie in shuffled blocks of a cache that is NaN everywhere else."""

    q_THD: torch.Tensor
    cache_B2GSD: torch.Tensor
    tables_SM: torch.Tensor
    contexts: list[int]
    queries: list[int]

    @property
    def starts_S1(self) -> torch.Tensor:
        return torch.tensor([0, *self.queries], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)

    @property
    def contexts_S(self) -> torch.Tensor:
        return torch.tensor(self.contexts, dtype=torch.int32, device=DEVICE)

    def reference(self, window: int | None) -> torch.Tensor:
        """float32 [T, H * D]; rows without context are zero."""
        cache = self.cache_B2GSD.float().cpu()
        slots_X2GD = cache.permute(0, 3, 1, 2, 4).flatten(0, 1)
        real = [s for s, c in enumerate(self.contexts) if c and self.queries[s]]
        starts, out = self.starts_S1.tolist(), torch.zeros(self.q_THD.shape).flatten(1)
        for s in real:
            q = self.q_THD[starts[s] : starts[s + 1]].float().cpu()
            tables = self.tables_SM[s : s + 1].cpu()
            plan = AttentionPlan.build([0, len(q)], [self.contexts[s]], tables, cache.shape[3], window)
            out[starts[s] : starts[s + 1]] = paged_attention(q, slots_X2GD, plan, impl="reference")
        return out


def problem(
    contexts: Sequence[int],
    queries: Sequence[int] | None = None,
    heads: tuple[int, int] = (2, 1),
    dim: int = 16,
    block: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Table entries beyond a context name block 0, which nobody owns."""
    gen = torch.Generator().manual_seed(seed)
    queries = list(queries or [1] * len(contexts))
    needed = [-(-c // block) for c in contexts]
    order = (torch.randperm(sum(needed), generator=gen) + 1).int()
    cache = torch.full((sum(needed) + 1, 2, heads[1], block, dim), float("nan"), dtype=dtype)
    tables = torch.zeros(len(contexts), max([*needed, 1]) + 1, dtype=torch.int32)
    for s, (context, blocks) in enumerate(zip(contexts, order.split(needed), strict=True)):
        tables[s, : len(blocks)] = blocks
        for i, b in enumerate(blocks.tolist()):
            filled = min(context - i * block, block)
            cache[b, :, :, :filled] = torch.randn(2, heads[1], filled, dim, generator=gen).to(dtype)
    q = (torch.randn(sum(queries), heads[0], dim, generator=gen) * 2).to(dtype)
    return Problem(q.to(DEVICE), cache.to(DEVICE), tables.to(DEVICE), list(contexts), queries)


def run_decode(
    p: Problem, window: int | None = None, config: DecodeConfig | None = CONFIG, workspace: Workspace | None = None
) -> torch.Tensor:
    rows_, heads, dim = p.q_THD.shape
    out = poisoned((rows_, heads * dim), p.q_THD.dtype)
    workspace = workspace or fresh_workspace(p)
    decode(
        p.q_THD, p.cache_B2GSD, p.tables_SM, p.contexts_S, window, out, None, None, NO_DELTAS, out, Kinds(), workspace,
        config=config,
    )  # fmt: skip
    assert not workspace.arrived.any(), "the next launch counts from zero"
    return out


def fresh_workspace(p: Problem, rows_: int | None = None) -> Workspace:
    count, heads, dim = p.q_THD.shape
    made = Workspace.empty(rows_ or count, heads, p.cache_B2GSD.shape[2], dim, DEVICE)
    return replace(
        made, partial=poisoned(made.partial.shape, torch.float32), stats=poisoned(made.stats.shape, torch.float32)
    )


def run_prefill(
    p: Problem, window: int | None = None, config: PrefillConfig | None = None, workspace: Workspace | None = None
) -> torch.Tensor:
    rows_, heads, dim = p.q_THD.shape
    out = poisoned((rows_, heads * dim), p.q_THD.dtype)
    prefill(
        p.q_THD, p.cache_B2GSD, p.starts_S1, p.contexts_S, p.tables_SM, window, out, max(p.queries),
        workspace=workspace, config=config,
    )  # fmt: skip
    assert workspace is None or not workspace.arrived.any(), "the next launch counts from zero"
    return out


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[actual.dtype]
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=tolerance, atol=tolerance)


CONTEXTS = {
    "one token": [1],
    "blocks": [7, 8, 9, 16],
    "splits": [31, 32, 33, 129],
    "long and short": [3, 300, 1, 64],
    "padding": [5, 0, 40, 0, 0],
    "only padding": [0, 0],
}


@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(contexts: list[int], dtype: torch.dtype) -> None:
    p = problem(contexts, dtype=dtype)
    assert_close(run_decode(p), p.reference(None))


@pytest.mark.parametrize(("heads", "dim"), HEADS.values(), ids=HEADS.keys())
def test_decode_heads(heads: tuple[int, int], dim: int) -> None:
    p = problem([50, 9, 0, 33], heads=heads, dim=dim, block=16)
    assert_close(run_decode(p), p.reference(None))


@pytest.mark.parametrize("window", [1, 20, 64])
def test_decode_window(window: int) -> None:
    p = problem([1, 19, 20, 21, 150])
    assert_close(run_decode(p, window), p.reference(window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_by_default(dtype: torch.dtype) -> None:
    """The configuration that a step without measurements has, for as many rows as it may have."""
    p = problem([*range(17), 700], heads=(2, 1), dim=64, block=16, dtype=dtype)
    assert_close(run_decode(p, config=None), p.reference(None))


def test_a_decoded_row_depends_on_no_other() -> None:
    """To the bit, and whichever program computes it."""
    contexts = [40, 300, 7, 129]
    p, workspace = problem(contexts), fresh_workspace(problem(contexts))
    together = run_decode(p, workspace=workspace)
    for s, context in enumerate(contexts):
        p.contexts = [context if i == s else 0 for i in range(4)]
        for programs in (1, 5):
            alone = run_decode(p, config=replace(CONFIG, programs=programs), workspace=workspace)
            assert torch.equal(alone[s], together[s])
            assert not alone[[i for i in range(4) if i != s]].any()


def test_a_bad_sequence_spoils_no_other() -> None:
    p = problem([40, 70, 33])
    expected = run_decode(p)
    p.cache_B2GSD[p.tables_SM[1, 2]] = float("nan")
    actual = run_decode(p)
    assert actual[1].isnan().any()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])


def test_decode_writes_planes() -> None:
    p = problem([40, 0, 9], heads=(20, 2))
    target, inputs = Target(0, 16, 320), 320
    made, batch, planes = world([target], [{"signs": 1}], torch.float32), rows([0, 1, 1]), poisoned_planes(1, 3, 320)
    out, kinds = poisoned((3, inputs), torch.float32), made.kinds()
    decode(
        p.q_THD, p.cache_B2GSD, p.tables_SM, p.contexts_S, None, out, planes, target, made.deltas, batch.entry_T, kinds,
        fresh_workspace(p), config=CONFIG,
    )  # fmt: skip
    assert torch.equal(values(planes, inputs), values(planes_reference(out[None]), inputs))


TURNS = {
    "in turn": replace(CONFIG, turn=True),
    "in registers": replace(CONFIG, turn=True, stages=1),
    "direct": replace(CONFIG, turn=True, direct=True),
    "direct, in registers": replace(CONFIG, chunk=16, splits=3, turn=True, direct=True, stages=1),
    "a launch before it": replace(CONFIG, direct=True, stages=1),
}


@pytest.mark.parametrize("config", TURNS.values(), ids=TURNS.keys())
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
def test_decode_turns_its_own(heads: tuple[int, int], window: int | None, config: DecodeConfig) -> None:
    """From a linear's partials, q and the newest key and value are as `rope_and_cache` makes them; the newest slots of
    the cache are NaN before, and nothing else of it is written."""
    check_turn([40, 0, 1, 17, 33, 150, 16], heads, 16, DTYPES[0], window, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_turns_by_default(dtype: torch.dtype) -> None:
    check_turn([70, 5, 0, 33], (4, 2), 40, dtype, None, None)


def check_turn(
    contexts: list[int], heads: tuple[int, int], dim: int, dtype: torch.dtype, window: int | None,
    config: DecodeConfig | None,
) -> None:  # fmt: skip
    p, (q, kv), gen = problem(contexts, heads=heads, dim=dim, dtype=dtype), heads, torch.Generator().manual_seed(1)
    total, count, batch = q + 2 * kv, len(contexts), rows([0, 1, 1, 2, 2, 0, 1][: len(contexts)])
    made = world([Target(0, 16, 8)], [{}] * 3, dtype, vectors=(total + 2) * dim)
    bias, q_norm, k_norm = (0, total * dim), (total * dim, (total + 1) * dim), ((total + 1) * dim, (total + 2) * dim)
    angles = torch.rand(count, dim // 2, generator=gen).to(DEVICE) * 6
    block = p.cache_B2GSD.shape[3]
    last = [max(c - 1, 0) for c in contexts]
    slots = [int(p.tables_SM[s, at // block]) * block + at % block if contexts[s] else 0 for s, at in enumerate(last)]
    slots_T = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    for slot in slots:
        p.cache_B2GSD[slot // block, :, :, slot % block] = torch.nan
    partials = random_partials(2, batch, total * dim, dtype, gen)
    turn = Turn(partials, (bias, q_norm, k_norm), 1e-5, angles.cos(), angles.sin(), slots_T)
    expected = replace(p, q_THD=torch.empty_like(p.q_THD), cache_B2GSD=p.cache_B2GSD.clone())
    rope_and_cache(turn, made.deltas, batch.entry_T, expected.q_THD, expected.cache_B2GSD)
    for _ in range(2):
        out, workspace = poisoned((count, q * dim), dtype), fresh_workspace(p)
        decode(
            poisoned(p.q_THD.shape, dtype), p.cache_B2GSD, p.tables_SM, p.contexts_S, window, out, None, None,
            made.deltas, batch.entry_T, Kinds(), workspace, turn=turn, config=config,
        )  # fmt: skip
        assert_close(out, expected.reference(window))
        assert not workspace.arrived.any(), "the next launch counts from zero"
    close = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps, "equal_nan": True}
    p.cache_B2GSD[0], expected.cache_B2GSD[0] = 0, 0  # padding's
    torch.testing.assert_close(p.cache_B2GSD, expected.cache_B2GSD, **close)


@pytest.mark.parametrize("config", [c for c in TURNS.values() if c.direct])
def test_a_directly_decoded_row_depends_on_no_other(config: DecodeConfig) -> None:
    contexts = [40, 300, 7, 129]
    p = problem(contexts)
    together = run_decode(p, config=config)
    assert_close(together, p.reference(None))
    for s, context in enumerate(contexts):
        p.contexts = [context if i == s else 0 for i in range(4)]
        assert torch.equal(run_decode(p, config=config)[s], together[s])


H200 = Chip(132, 227 * 1024, True)
CHUNKS = {
    "whole prompt": ([1], [1]),
    "whole prompts": ([5, 40, 16], [5, 40, 16]),
    "after a prefix": ([50, 100, 33], [3, 36, 1]),
    "nothing of one": ([50, 20, 9], [18, 0, 9]),
}
SMALL = PrefillConfig(rows=16, tile=16, warps=4, stages=2)


@pytest.mark.parametrize(("contexts", "queries"), CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("window", [None, 1, 13])
def test_prefill(contexts: list[int], queries: list[int], window: int | None) -> None:
    p = problem(contexts, queries)
    assert_close(run_prefill(p, window, SMALL), p.reference(window))


@pytest.mark.parametrize(("heads", "dim"), HEADS.values(), ids=HEADS.keys())
def test_prefill_heads(heads: tuple[int, int], dim: int) -> None:
    p = problem([45, 9], [20, 9], heads, dim, block=16)
    assert_close(run_prefill(p, None, SMALL), p.reference(None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 70])
def test_prefill_by_default(dtype: torch.dtype, window: int | None) -> None:
    p = problem([200, 30], [150, 30], (4, 2), 64, 16, dtype)
    assert_close(run_prefill(p, window), p.reference(window))


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("queries", [[1, 0], [9, 2]])
def test_programs_share_the_keys_of_few_tiles(
    queries: list[int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.paged_attention.device.Chip.of", lambda device: H200)
    p = problem([300, 40], queries, (2, 1))
    workspace = fresh_workspace(p, 64)
    for _ in range(2):
        assert_close(run_prefill(p, window, SMALL, workspace), p.reference(window))
    assert not workspace.partial[: SMALL.rows * 16].isnan().any(), "nothing was shared"


def test_a_prompt_depends_on_no_other() -> None:
    p = problem([50, 100, 33], [20, 36, 33])
    together, starts = run_prefill(p, None, SMALL), p.starts_S1.tolist()
    for s in range(3):
        mine = slice(starts[s], starts[s + 1])
        alone = replace(
            p, q_THD=p.q_THD[mine], tables_SM=p.tables_SM[s : s + 1], contexts=[p.contexts[s]], queries=[p.queries[s]]
        )
        assert torch.equal(run_prefill(alone, None, SMALL), together[mine])


def test_the_last_row_of_a_prompt_is_as_decoded() -> None:
    p = problem([61], [61], (8, 2), 32)
    last = replace(p, q_THD=p.q_THD[-1:], queries=[1])
    assert_close(run_decode(last), run_prefill(p)[-1:].float().cpu())


def test_workspace_is_as_planned() -> None:
    """Every number of rows up to the planned one fits, and the plan is what is allocated."""
    for most in (1, 20, 64, 256):
        made = Workspace.empty(most, 32, 8, 128, "meta")
        tensors = (made.partial, made.stats, made.arrived)
        assert sum(t.nbytes for t in tensors) == workspace_bytes(most, 32, 8, 128)
        for count in range(1, most + 1):
            assert count * decode_rule(count, 8, 4, 128, H200).splits * 32 * 128 <= made.partial.numel()


def test_candidates_are_valid_and_begin_with_the_rule() -> None:
    for rows_, group in ((1, 1), (64, 1), (16, 8)):
        found = decode_candidates(rows_, 8, group, 128, H200)
        assert found[0] == decode_rule(rows_, 8, group, 128, H200)
        found += [r for c in found for r in decode_refinements(c, rows_)]
        assert all(c.chunk % c.tile == 0 and 0 < c.splits <= splits_of(rows_) for c in found)
    assert prefill_candidates(512, 4, 128, H200)[0] == prefill_rule(512, 4, 128, H200)
