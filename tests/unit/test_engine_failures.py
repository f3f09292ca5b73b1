"""What fails fails alone, and tells its own requests; who waits is not starved, and what is refused says why."""

from __future__ import annotations

import threading

import pytest

from bitdelta_core.engine.choice import Choice
from bitdelta_core.errors import (
    CheckpointError,
    ContextLengthExceeded,
    DeltaError,
    DeltaFormatError,
    DeltaTooLarge,
    DeltaUnavailable,
    InvalidRequest,
)
from tests.unit.engine_fakes import POISON, World, answer

A, B, C = ("0a", "0b", "0c")
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5)
pytestmark = pytest.mark.usefixtures("every_runner")


def test_a_corrupt_delta_fails_its_own_requests_only() -> None:
    world = World()
    world.source.errors[B] = DeltaFormatError("tensor x is truncated", delta=B)
    for name, delta in (("base", None), ("a", A), ("b1", B), ("b2", B), ("c", C)):
        world.ask(name, PROMPT, delta=delta)
    world.run()
    assert set(world.errors) == {"b1", "b2"}
    assert world.errors["b1"] is world.source.errors[B]
    assert all(world.tokens(n) == answer(d, PROMPT, 6) for n, d in (("base", None), ("a", A), ("c", C)))
    assert world.source.opened.count(B) == 1, "not single flight"
    world.ask("b3", PROMPT, delta=B)
    assert world.errors["b3"] is world.source.errors[B]
    assert world.source.opened.count(B) == 1, "tried again within its quarantine"
    world.assert_idle()


def test_a_quarantine_ends() -> None:
    world = World(retry_s=0.0)
    world.source.errors[B] = OSError("disk on fire")
    world.ask("first", PROMPT, delta=B)
    world.run()
    error = world.errors["first"]
    assert isinstance(error, DeltaUnavailable)
    assert error.delta == B
    assert "disk on fire" in str(error)
    error.retry_after_s = 0.0
    world.core.residency._entries[B].retry_at = 0.0
    del world.source.errors[B]
    world.ask("second", PROMPT, delta=B)
    world.run()
    assert world.tokens("second") == answer(B, PROMPT, 6)


def test_a_poisoned_variant_fails_alone() -> None:
    world = World()
    world.source.salts[B] = POISON
    for name, delta in (("base", None), ("a", A), ("b", B)):
        world.ask(name, PROMPT, delta=delta, n=2)
    world.run()
    assert set(world.errors) == {"b"}
    assert isinstance(world.errors["b"], DeltaError)
    assert world.errors["b"].delta == B
    assert all(world.tokens(n, i) == answer(d, PROMPT, 6) for n, d in (("base", None), ("a", A)) for i in range(2))
    world.assert_idle()


@pytest.mark.parametrize("method", ["accept", "add_prompt_logprobs"])
def test_text_that_cannot_be_made_fails_its_own_request_only(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(Choice, method)

    def failing(self: Choice, *args: object) -> object:
        if self.seq.delta == B:
            raise CheckpointError("its tokenizer cannot decode")
        return own(self, *args)

    monkeypatch.setattr(Choice, method, failing)
    world = World()
    for name, delta in (("base", None), ("a", A), ("b", B)):
        world.ask(name, PROMPT, delta=delta, n=2, prompt_logprobs=1)
    world.run()
    assert set(world.errors) == {"b"}
    assert all(world.tokens(n, i) == answer(d, PROMPT, 6) for n, d in (("base", None), ("a", A)) for i in range(2))
    world.assert_idle()


def test_a_source_that_leaves_its_thread_fails_its_own_requests() -> None:
    """Not with an Exception: a panic of a library in Rust."""
    world = World()
    world.source.errors[B] = SystemExit("panic")  # pyright: ignore[reportArgumentType]
    for name, delta in (("a", A), ("b", B)):
        world.ask(name, PROMPT, delta=delta)
    world.run()
    assert isinstance(world.errors["b"], DeltaUnavailable)
    assert world.tokens("a") == answer(A, PROMPT, 6)


def test_an_error_that_is_kept_keeps_nothing_else() -> None:
    """Every request within the quarantine gets it: a traceback would grow, and hold what its frames hold."""
    world = World()
    world.source.errors[B] = DeltaFormatError("tensor x is truncated", delta=B)
    for i in range(3):
        world.ask(f"b{i}", PROMPT, delta=B)
        world.run()
        assert world.errors[f"b{i}"].__traceback__ is None


def test_a_base_without_a_finite_logit_is_named() -> None:
    world = World()
    world.decoder.base_salt = POISON
    world.ask("r", PROMPT)
    world.run()
    assert isinstance(world.errors["r"], CheckpointError)


def test_a_slow_source_stalls_nobody() -> None:
    world = World()
    world.source.gates = {delta: threading.Event() for delta in (B, C)}
    world.ask("slow", PROMPT, delta=B)
    world.ask("slower", PROMPT, delta=C)
    world.ask("base", PROMPT, max_tokens=20)
    world.ask("other", PROMPT, delta=A, max_tokens=20)
    world.run("base", "other")
    assert world.tokens("other") == answer(A, PROMPT, 20)
    assert world.core.stats().waiting_for_delta == 2
    assert not world.step(), "there is nothing to compute, and the loop does not wait for the source"
    for gate in world.source.gates.values():
        gate.set()
    world.run()
    assert world.tokens("slow") == answer(B, PROMPT, 6)
    world.assert_idle()


def test_a_delta_that_can_never_fit() -> None:
    world = World(slab_bytes=2048)
    world.source.sizes[B] = 2049
    world.ask("a", PROMPT, delta=A)
    world.ask("b", PROMPT, delta=B)
    world.run()
    assert isinstance(world.errors["b"], DeltaTooLarge)
    assert "2049" in str(world.errors["b"])
    assert "2048" in str(world.errors["b"])
    assert world.tokens("a") == answer(A, PROMPT, 6)


def test_who_waits_for_room_in_the_slab_is_not_starved() -> None:
    """A popular delta has new requests all the time; the one that does not fit beside it gets in all the same."""
    world = World(slab_bytes=1024)
    world.ask("popular", PROMPT, delta=A, max_tokens=8)
    world.run_until(lambda: bool(world.core.scheduler.running))
    world.ask("rare", PROMPT, delta=B)
    i = 0
    while not world.finished("rare"):
        world.ask(f"popular{i}", PROMPT, delta=A, max_tokens=8)
        world.woken.clear()
        if not world.step():
            assert world.woken.wait(20)
        i += 1
        assert i < 400, "starved"
    assert world.tokens("rare") == answer(B, PROMPT, 6)
    world.run()
    assert all(world.tokens(f"popular{j}") == answer(A, PROMPT, 8) for j in range(i))


def test_patience_keeps_serving_residents_meanwhile() -> None:
    world = World(slab_bytes=1024, patience_s=3600)
    world.ask("long", PROMPT, delta=A, max_tokens=30)
    world.ask("rare", PROMPT, delta=B)
    world.ask("short", PROMPT, delta=A)
    world.run("short")
    assert not world.finished("long")
    world.run()
    assert world.tokens("rare") == answer(B, PROMPT, 6)


def test_nobody_wants_it_any_more() -> None:
    world = World(slab_bytes=1024)
    world.source.gates[B] = threading.Event()
    world.ask("gone", PROMPT, delta=B)
    world.step()
    world.core.abort("gone")
    world.source.gates[B].set()
    world.ask("a", PROMPT, delta=A)
    world.run("a")
    world.assert_idle()


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([1] * 48, {}, ContextLengthExceeded, "prompt"),
        ([1] * 40, {"max_tokens": 9}, ContextLengthExceeded, "max_tokens"),
        ([26], {}, InvalidRequest, "prompt"),
        ([-1], {}, InvalidRequest, "prompt"),
        ([1], {"logit_bias": {26: 1.0}}, InvalidRequest, "logit_bias"),
    ],
)
def test_what_does_not_suit_the_variant(prompt: list[int], params: dict, error: type, param: str) -> None:
    world = World()
    world.ask("r", prompt, **params)
    assert isinstance(world.errors["r"], error)
    assert world.errors["r"].param == param  # pyright: ignore[reportAttributeAccessIssue]
    world.assert_idle()


def test_the_context_is_the_variants_own() -> None:
    world = World()
    world.ask("base", [1] * 30, max_tokens=None)
    world.ask("variant", [1] * 50, delta=A, max_tokens=None)
    world.run()
    assert (world.last("base").completion_tokens, world.last("base").finish_reason) == (18, "length")
    assert world.last("variant").completion_tokens == 14
