"""Python's garbage collector beside a running engine.

A full collection looks at every object there is. With torch, transformers and a compiler imported that takes 0.1 to
0.4 s, in which every sequence waits. What exists when an engine has started is there to stay: collections leave it out
until it is closed, and then what the others of the process have.
"""

from __future__ import annotations

import gc
import threading

_lock = threading.Lock()
_engines = 0


def set_aside() -> None:
    """An engine has started."""
    global _engines
    with _lock:
        _engines += 1
        gc.freeze()


def take_back() -> None:
    """An engine is closed: a collection finds its cycles now."""
    global _engines
    with _lock:
        _engines -= 1
        gc.unfreeze()


def set_rest_aside() -> None:
    """What is left belongs to others that still run, if any do."""
    with _lock:
        if _engines:
            gc.freeze()
