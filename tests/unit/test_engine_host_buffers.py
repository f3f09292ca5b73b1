"""Pinned buffers are made once and lent again, never to two at a time; the host cache keeps its budget."""

from __future__ import annotations

import random

import torch

from bitdelta_core.engine.accelerator import Plain
from bitdelta_core.engine.host_buffers import SMALLEST, HostBuffer, HostBuffers
from bitdelta_core.engine.host_cache import HostCache
from tests.unit.engine_fakes import World, answer

CPU = torch.device("cpu")


class Pinned(Plain):
    """A CPU that says of its memory what a GPU's host says of pinned memory."""

    keeps_host_buffers = True


def test_what_is_given_back_is_lent_again() -> None:
    buffers = HostBuffers(Pinned(CPU), keep=2)
    first = buffers.take(1000)
    assert (first.bytes_.numel(), first.nbytes) == (1000, SMALLEST)
    buffers.give_back(first)
    again = buffers.take(SMALLEST)
    assert again.whole is first.whole
    assert buffers.take(1000).whole is not first.whole, "lent to two"
    assert buffers.made == 2


def test_a_large_buffer_is_not_spent_on_a_small_delta() -> None:
    buffers = HostBuffers(Pinned(CPU), keep=2)
    large = buffers.take(7 * SMALLEST)
    assert large.nbytes == 8 * SMALLEST
    buffers.give_back(large)
    assert buffers.take(4 * SMALLEST).whole is not large.whole
    assert buffers.take(5 * SMALLEST).whole is large.whole


def test_so_many_of_each_size_are_kept() -> None:
    buffers = HostBuffers(Pinned(CPU), keep=2)
    taken = [buffers.take(n * SMALLEST) for n in (2, 1, 4, 2, 2)]
    for buffer in taken:
        buffers.give_back(buffer)
        buffers.check_integrity()
    assert [kept.nbytes // SMALLEST for kept in buffers._kept] == [1, 2, 2, 4]


def test_no_two_hold_the_same_bytes() -> None:
    rng, buffers = random.Random(1), HostBuffers(Pinned(CPU), keep=3)
    held: list[tuple[HostBuffer, int]] = []
    for turn in range(200):
        if held and rng.random() < 0.5:
            buffer, mark = held.pop(rng.randrange(len(held)))
            assert (buffer.bytes_ == mark).all(), "written to by another"
            buffers.give_back(buffer)
        else:
            buffer = buffers.take(rng.randrange(1, 2000))
            buffer.bytes_.fill_(turn % 256)
            held.append((buffer, turn % 256))
        buffers.check_integrity()
    assert buffers.made < 100


def test_cheap_memory_is_not_kept() -> None:
    buffers = HostBuffers(Plain(CPU), keep=2)
    first = buffers.take(1000)
    assert first.nbytes == 1000
    buffers.give_back(first)
    assert buffers._kept == []


def test_the_host_cache_gives_back_what_it_drops() -> None:
    buffers = HostBuffers(Pinned(CPU), keep=4)
    cache = HostCache(buffers, 2 * SMALLEST)
    taken = {name: buffers.take(10) for name in "abc"}
    for name, host in taken.items():
        cache.put(name, name.upper(), host)
        cache.check_integrity()
    assert cache.pop("a") is None
    assert cache.pop("c") == ("C", taken["c"])
    assert [kept.whole is taken["a"].whole for kept in buffers._kept] == [True]


def test_many_loads_make_few_buffers() -> None:
    """Twelve deltas pass through a slab of two: as many buffers as loads may be under way, and those of the cache."""
    world = World(slab_bytes=2048, accelerator=Pinned(CPU), host_cache_bytes=3 * SMALLEST)
    for turn in range(2):
        for i in range(12):
            name = f"{turn}.{i}"
            world.ask(name, [i], delta=f"{i:02x}", max_tokens=2)
            world.run(name)
            assert world.tokens(name) == answer(f"{i:02x}", [i], 2)
    world.assert_idle()
    assert world.core.stats().delta_loads_total == 24
    assert world.core.residency._hosts.made <= 3 + 2
