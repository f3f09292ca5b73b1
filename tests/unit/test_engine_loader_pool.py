"""Threads that fetch and load."""

from __future__ import annotations

import threading

from bitdelta_core.engine.loader_pool import LoaderPool


def test_jobs_run_in_their_order() -> None:
    pool, found, done = LoaderPool("pool", 1), [], threading.Event()
    for i in range(5):
        pool.submit(lambda i=i: found.append(i))
    pool.submit(done.set)
    assert done.wait(10)
    assert found == [0, 1, 2, 3, 4]
    pool.close()


def test_what_nobody_has_begun_is_dropped_at_the_end() -> None:
    pool, found, begun, gate = LoaderPool("pool", 1), [], threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        gate.wait(10)

    pool.submit(first)
    assert begun.wait(10)
    for i in range(5):
        pool.submit(lambda i=i: found.append(i))
    pool.close()
    gate.set()
    pool._threads[0].join(10)
    assert not pool._threads[0].is_alive()
    assert not found
