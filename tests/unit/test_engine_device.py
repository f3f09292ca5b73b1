"""The device runner over a fake decoder: what is its own beside what every runner does (`test_engine_core.py`)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from bitdelta_core.engine import device_runner as device_runner_module
from bitdelta_core.engine import rehearsal
from bitdelta_core.engine.device_runner import DeviceRunner
from bitdelta_core.models.device.kinds import StepKinds, few_ranks, step_union
from bitdelta_core.models.device.passes import WideStep
from kernels.delta_linear.row_tiles import row_tiles
from kernels.device import Kinds
from tests.unit.engine_device_fakes import device_runner
from tests.unit.engine_fakes import World, answer

A, B = ("0a", "0b")
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5)


def test_prompt_logprobs_of_more_rows_than_a_pass_gives_logits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdelta_core.engine.pieces.MAX_ROWS", 2)
    found = []
    for runner in ("torch", "device"):
        world = World(runner=runner)
        for i, delta in enumerate((A, None, B)):
            world.ask(f"r{i}", PROMPT[i:], delta=delta, prompt_logprobs=1, max_tokens=3)
        world.run()
        found.append([world.events[f"r{i}"][0].prompt_logprobs for i in range(3)])
        assert [world.tokens(f"r{i}") for i in range(3)] == [
            answer(d, PROMPT[i:], 3) for i, d in enumerate((A, None, B))
        ]
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert [p and p.chosen.token_id for p in ours] == [p and p.chosen.token_id for p in theirs]
        pairs = [(a.chosen, b.chosen) for a, b in zip(ours, theirs, strict=True) if a and b]
        assert len(pairs) == len(ours) - 1
        assert all(a.logprob == pytest.approx(b.logprob) and a.rank == b.rank for a, b in pairs)


def test_counts_of_penalties_go_from_sequence_to_sequence() -> None:
    """Twice as many penalised requests as rows of counts, some preempted, some aborted."""
    found = []
    for runner in ("torch", "device"):
        world = World(runner=runner, max_num_seqs=3, blocks=9)
        world.ask("first", [1], delta=A, max_tokens=1)
        world.run()  # from here on nothing depends on how fast loader threads are
        for i in range(8):
            world.ask(
                f"r{i}", PROMPT[: 1 + i], delta=(A, None)[i % 2], max_tokens=9, repetition_penalty=1.9, temperature=1.0
            )
            if i % 3 == 2:
                world.step()
                world.core.abort(f"r{i}")
        names = [f"r{i}" for i in range(8) if i % 3 != 2]
        world.run(*names)
        assert world.core.stats().preemptions_total > 0, "the case is not tested"
        found.append([world.tokens(name) for name in names])
    assert found[0] == found[1]


def test_a_new_kind_of_delta_is_captured_on_padding() -> None:
    """A capture launches a step several times: nothing of a running sequence may be counted or overwritten by that."""
    world = World(runner="device")
    assert isinstance(world.runner, DeviceRunner)
    before = world.runner.graphs.captured
    world.ask("base", PROMPT, max_tokens=12, repetition_penalty=1.5)
    for _ in range(4):
        world.step()
    world.ask("new", PROMPT, delta=A, max_tokens=5)
    world.run()
    assert world.runner.graphs.captured > before, "the case is not tested"
    alone = World(runner="torch")
    alone.ask("base", PROMPT, max_tokens=12, repetition_penalty=1.5)
    alone.run()
    assert world.tokens("base") == alone.tokens("base")
    assert world.tokens("new") == answer(A, PROMPT, 5)


def test_a_step_is_launched_before_the_last_one_is_over() -> None:
    world = World(runner="device")
    world.ask("r", PROMPT, max_tokens=4)
    world.step()
    [launched] = world.core._launched
    assert not launched.pending.ready()
    assert world.tokens("r") == []
    world.step()
    assert world.tokens("r") == answer(None, PROMPT, 1)
    assert len(world.core._launched) == 1
    world.run()
    assert world.tokens("r") == answer(None, PROMPT, 4)


def test_a_start_computes_its_steps_with_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that their kernels are there: ranks rounded up, and what is expected together, as steps with both have it. On
    padding, which nobody's KV or counts see."""
    runner, tables, decoder, _ = device_runner(64, 16, 4, 500)
    seen: list[tuple[tuple[int, ...], int, StepKinds]] = []
    prefill = decoder.prefill

    def noting(step: WideStep, sampled_S: torch.Tensor, kv: Any, kinds: StepKinds) -> torch.Tensor:
        lengths = [stop - start for _, start, stop in step.segments]
        starts = [0, *accumulate(lengths)]
        assert {entry for entry, _, _ in step.segments} == {0 if kinds == StepKinds() else 1}
        assert step.rows.query_starts_S1.tolist() == starts
        assert step.rows.context_lens_S.tolist() == lengths
        assert step.rows.positions_T.tolist() == [place for rows in lengths for place in range(rows)]
        assert step.tiles_I4.tolist() == row_tiles(step.segments)
        assert not step.rows.kv_slots_T.any()
        assert not step.rows.entry_T.any()
        seen.append((tuple(lengths), step.rows.logit_rows_L.shape[0], kinds))
        return prefill(step, sampled_S, kv, kinds)

    monkeypatch.setattr(decoder, "prefill", noting)
    monkeypatch.setattr(tables, "extents", {1: torch.zeros(64, dtype=torch.uint8)})
    factors = [Kinds(byte_rank=rank) for rank in (48, 64, 80)]
    runner.launch_each([StepKinds(layers=kinds) for kinds in (*factors, Kinds(rank=16))])
    met = dict.fromkeys(kinds.layers for _, _, kinds in seen)
    rounded = Kinds(byte_rank=64), Kinds(byte_rank=128), Kinds(rank=16), Kinds(byte_rank=128, rank=16)
    assert list(met) == [Kinds(), *rounded]
    for own in met:
        assert [(*step,) for *step, kinds in seen if kinds.layers == own] == rehearsal.steps(500, 4, 500, 256)


def test_ranks_of_a_step_are_those_that_a_start_has_met(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(runner="device")
    runner = world.runner
    assert isinstance(runner, DeviceRunner)
    met: list[StepKinds] = []
    kinds_of, factors = device_runner_module._kinds, StepKinds(Kinds(byte_rank=48))
    monkeypatch.setattr(device_runner_module, "_kinds", lambda pieces: step_union([kinds_of(pieces), factors]))
    prefill = runner._decoder.prefill
    monkeypatch.setattr(runner._decoder, "prefill", lambda *args: met.append(args[-1]) or prefill(*args))
    runner.launch_each([StepKinds(Kinds(byte_rank=250))])
    met.clear()
    world.ask("one", PROMPT, delta=A, max_tokens=1)
    world.run()
    assert {kinds.layers.byte_rank for kinds in met} == {256}


@pytest.mark.parametrize(("rank", "prepared", "used"), [(0, [64], 0), (48, [], 64), (48, [256], 256), (16, [256], 16)])
def test_ranks_are_rounded_up_to_what_is_near(rank: int, prepared: list[int], used: int) -> None:
    known = [StepKinds(head=Kinds(byte_rank=ready), layers=Kinds(byte_rank=32)) for ready in prepared]
    found = few_ranks(StepKinds(head=Kinds(byte_rank=rank, signs=True)), known)
    assert found == StepKinds(head=Kinds(byte_rank=used, signs=True))
