"""The engine stepped by hand over a fake model: answers, isolation, and nothing left behind."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.unit.engine_fakes import World, answer

A, B, C, D, E = ("0a", "0b", "0c", "0d", "0e")
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5)
pytestmark = pytest.mark.usefixtures("every_runner")


@pytest.mark.parametrize("delta", [None, A])
def test_answers_are_the_variants(delta: str | None) -> None:
    world = World()
    world.ask("r", PROMPT, delta=delta)
    world.run()
    assert world.tokens("r") == answer(delta, PROMPT, 6)
    last = world.last("r")
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("length", len(PROMPT), 6)
    assert world.text("r") == "".join(chr(97 + t) for t in answer(delta, PROMPT, 6))
    world.assert_idle()


@pytest.mark.parametrize("mix", ["distinct", "identical", "uniform", "zipf", "base"])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 2, "max_num_batched_tokens": 2},
        {"blocks": 9, "prefix_caching": False},
        {"blocks": 9},
        {"max_variants_per_step": 1},
        {"slab_bytes": 1024},
        {"block_size": 1, "blocks": 40},
        {"slab_bytes": 1024, "host_cache_bytes": 2048},
    ],
    ids=["roomy", "chunks", "preemption", "preemption-cache", "one-variant", "tiny-slab", "blocks-of-1", "host-cache"],
)
def test_answers_do_not_depend_on_the_batch(mix: str, limits: dict[str, Any]) -> None:
    world, rng = World(**limits), random.Random(f"{mix}{limits}")
    pools: dict[str, list[str | None]] = {
        "distinct": [None, A, B, C, D, E],
        "identical": [A],
        "uniform": [A, B, C],
        "zipf": [A, A, A, A, B, B, C, None],
        "base": [None],
    }
    if limits.get("blocks") == 9:  # who meets whom for blocks must not depend on how fast loader threads are
        for delta in dict.fromkeys(pools[mix]):
            world.ask(f"first {delta}", [1], delta=delta, max_tokens=1)
        world.run()
    asked = {}
    for i in range(12):
        delta = pools[mix][i % len(pools[mix])]
        prompt = PROMPT[: rng.randrange(1, 10)] if rng.random() < 0.5 else [rng.randrange(26) for _ in range(7)]
        count = rng.randrange(1, 12)
        world.ask(f"r{i}", prompt, delta=delta, tenant=rng.choice("xy"), max_tokens=count)
        asked[f"r{i}"] = answer(delta, prompt, count)
        if rng.random() < 0.4:
            world.step()
    world.run()
    assert not world.errors
    assert {name: world.tokens(name) for name in asked} == asked
    world.assert_idle()
    if limits.get("blocks") == 9:
        assert world.core.stats().preemptions_total > 0, "the case is not tested"
    if limits.get("slab_bytes") == 1024 and mix == "distinct":
        assert world.core.stats().delta_evictions_total > 0, "the case is not tested"


def test_prefix_cache_is_used_within_a_variant_and_never_across() -> None:
    world = World()
    for i, delta in enumerate((None, A, None, A)):
        world.ask(f"r{i}", PROMPT, delta=delta)
        world.run()
        assert world.tokens(f"r{i}") == answer(delta, PROMPT, 6)
    assert [world.last(f"r{i}").cached_tokens for i in range(4)] == [0, 0, 8, 8]
    stats = world.core.stats()
    assert (stats.prefix_cache_hits_total, stats.prefix_cache_queries_total) == (16, 4 * len(PROMPT))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_share_the_prompts_blocks(prefix_caching: bool) -> None:
    world = World(prefix_caching=prefix_caching)
    world.ask("r", PROMPT, n=4, max_tokens=12)
    world.step()
    world.step()
    assert len(world.core.scheduler.running) == 4
    shared = [tuple(seq.table[:2]) for seq in world.core.scheduler.running]
    assert len(set(shared)) == 1
    world.run()
    assert all(world.tokens("r", i) == answer(None, PROMPT, 12) for i in range(4))
    assert world.decoder.rows_computed == len(PROMPT) + 3 * 1 + 4 * 11
    world.assert_idle()


def test_choices_with_temperature_differ_but_repeat() -> None:
    texts = []
    for chunk in (16, 8):
        world = World(max_num_batched_tokens=chunk)
        world.ask("r", PROMPT, n=4, temperature=2.0, seed=11, max_tokens=10)
        world.run()
        texts.append([world.text("r", i) for i in range(4)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_a_seeded_request_gives_the_same_alone_and_in_company() -> None:
    alone = World()
    alone.ask("r", PROMPT, delta=A, temperature=1.7, seed=5, max_tokens=12)
    alone.run()
    company = World(blocks=12, max_num_batched_tokens=9)
    for delta in (A, B):  # resident first: who is preempted must not depend on how fast loader threads are
        company.ask(f"first {delta}", [1], delta=delta, max_tokens=1)
        company.run()
    for i in range(6):
        company.ask(f"x{i}", PROMPT[i:], delta=[None, A, B][i % 3], temperature=1.0, seed=i, max_tokens=9)
    company.ask("r", PROMPT, delta=A, temperature=1.7, seed=5, max_tokens=12)
    company.run()
    assert company.core.stats().preemptions_total > 0
    assert company.text("r") == alone.text("r")


def test_tenants_share_while_one_floods() -> None:
    world = World(max_num_seqs=2)
    for i in range(12):
        world.ask(f"flood{i}", PROMPT[:4], tenant="flood")
    world.ask("late", PROMPT[:4], tenant="quiet")
    world.run("late")
    assert sum(world.finished(f"flood{i}") for i in range(12)) <= 4
    world.run()


def test_stopping() -> None:
    whole = answer(None, PROMPT, 12)
    text = "".join(chr(97 + t) for t in whole)
    world = World()
    world.ask("string", PROMPT, stop=(text[3:6],), max_tokens=12)
    world.ask("include", PROMPT, stop=(text[3:6],), include_stop_str_in_output=True, max_tokens=12)
    world.ask("token", PROMPT, stop_token_ids=(whole[2],), max_tokens=12)
    world.ask("wait", PROMPT, stop=(text[1:3],), min_tokens=5, max_tokens=8)
    world.run()
    assert (world.text("string"), world.last("string").stop_reason) == (text[:3], text[3:6])
    assert world.text("include") == text[:6]
    first = whole.index(whole[2])
    assert (world.text("token"), world.last("token").stop_reason) == (text[:first], whole[2])
    assert world.last("wait").completion_tokens >= 5
    assert {world.last(n).finish_reason for n in ("string", "include", "token")} == {"stop"}
    world.assert_idle()


def test_end_of_sequence() -> None:
    whole = answer(None, PROMPT, 12)
    world = World(stop_ids=frozenset({whole[3]}))
    world.ask("eos", PROMPT, max_tokens=12)
    world.ask("ignore", PROMPT, max_tokens=12, ignore_eos=True)
    world.run()
    first = whole.index(whole[3])
    assert world.tokens("eos") == whole[: first + 1]
    assert (world.last("eos").finish_reason, world.last("eos").stop_reason) == ("stop", None)
    assert world.text("eos") == "".join(chr(97 + t) for t in whole[:first])
    assert world.tokens("ignore") == whole


def test_logprobs_of_prompt_and_answer_survive_chunks_and_the_cache() -> None:
    whole = World()
    whole.ask("r", PROMPT, logprobs=2, prompt_logprobs=1, max_tokens=3)
    whole.run()
    chunked = World(max_num_batched_tokens=8, max_num_seqs=3)
    chunked.ask("warm", PROMPT)
    chunked.run()
    chunked.ask("r", PROMPT, logprobs=2, prompt_logprobs=1, max_tokens=3)
    chunked.run()
    assert chunked.events["r"][0].prompt_logprobs == whole.events["r"][0].prompt_logprobs
    prompt_logprobs = whole.events["r"][0].prompt_logprobs
    assert prompt_logprobs is not None
    assert prompt_logprobs[0] is None
    assert [p.chosen.token_id for p in prompt_logprobs if p] == list(PROMPT[1:])
    for event in whole.events["r"][1:]:
        [position] = event.logprobs
        assert position.chosen.token_id == event.token_ids[0] == position.top[0].token_id
        assert position.chosen.rank == 1
        assert position.chosen.text == chr(97 + event.token_ids[0])


def test_prompt_logprobs_of_one_token() -> None:
    world = World()
    world.ask("r", [3], prompt_logprobs=1, max_tokens=2)
    world.run()
    assert world.events["r"][0].prompt_logprobs == (None,)
    assert world.tokens("r") == answer(None, [3], 2)


def test_many_variants_through_a_tiny_slab() -> None:
    """Two of eight fit, of three sizes, loaded and evicted all the time: nobody sees another's bytes."""
    world, rng = World(slab_bytes=2560, max_num_seqs=4), random.Random(3)
    deltas = [f"{i:02x}" for i in range(16, 24)]
    world.source.sizes = {delta: rng.choice([256, 1000, 1300]) for delta in deltas}
    expected = {}
    for i in range(40):
        delta, prompt = rng.choice([*deltas, None]), [rng.randrange(26) for _ in range(rng.randrange(1, 9))]
        world.ask(f"r{i}", prompt, delta=delta, max_tokens=4)
        expected[f"r{i}"] = answer(delta, prompt, 4)
        if i % 6 == 5:
            world.run()
    world.run()
    assert {name: world.tokens(name) for name in expected} == expected
    assert world.core.stats().delta_evictions_total >= 5
    world.assert_idle()


def test_aborts_at_any_moment_leave_nothing() -> None:
    for seed in range(25):
        world, rng = World(blocks=14, slab_bytes=2048), random.Random(seed)
        expected = {}
        for i in range(10):
            delta, prompt = rng.choice([None, A, B, C]), [rng.randrange(26) for _ in range(rng.randrange(1, 12))]
            world.ask(f"r{i}", prompt, delta=delta, max_tokens=rng.randrange(1, 9), n=rng.choice([1, 1, 3]))
            expected[f"r{i}"] = (delta, prompt)
        aborted = rng.sample(sorted(expected), 6)
        for name in aborted:
            for _ in range(rng.randrange(4)):
                world.step()
            world.core.abort(name)
            world.core.abort(name)
            world.core.check_integrity()
            seen = len(world.events[name])
            world.step()
            assert len(world.events[name]) == seen, "an event after the abort"
        survivors = [name for name in expected if name not in aborted]
        world.run(*survivors)
        for name in survivors:
            delta, prompt = expected[name]
            assert world.tokens(name) == answer(delta, prompt, len(world.tokens(name)))
        world.assert_idle()
