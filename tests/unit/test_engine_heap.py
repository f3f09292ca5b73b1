"""What full collections look at while engines run."""

from __future__ import annotations

import gc

import pytest

from bitdelta_core.engine import heap


@pytest.fixture(autouse=True)
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of this process may run."""
    monkeypatch.setattr(heap, "_engines", 0)
    gc.unfreeze()


def test_collections_leave_out_what_was_there_until_the_last_engine_is_closed() -> None:
    heap.set_aside()
    aside = gc.get_freeze_count()
    assert aside > 10_000
    heap.set_aside()
    heap.take_back()
    assert gc.get_freeze_count() == 0, "what the closed one leaves can be found"
    heap.set_rest_aside()
    assert gc.get_freeze_count() > aside / 2, "one still runs"
    heap.take_back()
    heap.set_rest_aside()
    assert gc.get_freeze_count() == 0


def test_what_comes_later_is_collected() -> None:
    class Node:
        pass

    heap.set_aside()
    node = Node()
    node.self = node  # pyright: ignore[reportAttributeAccessIssue]
    del node
    assert gc.collect() >= 1
    heap.take_back()
