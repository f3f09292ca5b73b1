"""Compress full fine-tunes of one base model into small deltas, and serve them all together.

    from bitdelta_core import Engine, EngineConfig, GenerationRequest, SamplingParams

`Engine` needs torch and transformers, which take seconds to import: it is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitdelta_core.engine.api import EngineStats, GenerationRequest, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from bitdelta_core.engine.completion import Completion
    from bitdelta_core.engine.config import EngineConfig
    from bitdelta_core.engine.engine import Engine

__all__ = ["Completion", "Engine", "EngineConfig", "EngineStats", "GenerationRequest", "SamplingParams", "TokenEvent"]

_LAZY = {"Completion": "completion", "Engine": "engine", "EngineConfig": "config"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"bitdelta_core.engine.{_LAZY[name]}"), name)
