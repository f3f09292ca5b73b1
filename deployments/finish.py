"""How a choice's end is told to clients, who know `stop` and `length` only."""

from __future__ import annotations

from typing import Any

from bitdelta_core.engine.api import TokenEvent
from deployments.errors import ReplicaLost


def finish_of(event: TokenEvent, *, generated: bool = True) -> dict[str, Any]:
    """finish_reason, and stop_reason when there is one. `generated` False: no token was asked for.

    Raises:
        ReplicaLost: the engine ended the choice without finishing it.
    """
    if event.finish_reason in ("abort", "error"):
        raise ReplicaLost(
            f"The engine ended request {event.request_id} before it was finished ({event.finish_reason})."
        )
    if event.finish_reason is None:
        return {"finish_reason": None}
    if not generated:
        return {"finish_reason": "length"}
    return {"finish_reason": event.finish_reason} | (
        {} if event.stop_reason is None else {"stop_reason": event.stop_reason}
    )
