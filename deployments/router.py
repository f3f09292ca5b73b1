"""Which replica gets a request: the one that is likely to hold its delta, unless that one is too busy.

Every router process ranks replicas for a delta by rendezvous hashing (highest random weight; Thaler and Ravishankar,
1998), so they agree without talking. Load is bounded as in "Consistent Hashing with Bounded Loads" (Mirrokni et al.,
2016): a replica whose queue is past the bound is passed over, first for one that already holds the delta. Rows of the
bare base go to the shortest queue.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

RESIDENT = "resident"
"""Key of a replica's routing stats under which it lists the deltas that it holds (`hint`)."""
LOAD = "load"
"""Key under which a replica says how many requests it works on, where routers do not see its replies (`direct`)."""
HINT_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the policy sees it."""

    id: str
    queue: int
    resident: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How far affinity goes."""

    spill_queue: int = 12
    """Up to this many requests a replica is never passed over."""
    load_factor: float = 1.25
    """Beyond that, it is passed over when its queue exceeds this multiple of the mean queue (plus one)."""

    def order(self, key: str | None, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all candidates, best first. `key`: sha256 of the delta, None for the base. Pure but for ties in
        the base's order, which are broken at random so that idle replicas share."""
        if key is None:
            return [c.id for c in sorted(candidates, key=lambda c: (c.queue, random.random()))]
        ranked = sorted(candidates, key=lambda c: _weight(key, c.id), reverse=True)
        limit = max(self.spill_queue, self.load_factor * sum(c.queue for c in ranked) / max(1, len(ranked)) + 1)
        free = [c for c in ranked if c.queue < limit]
        if free and free[0] is not ranked[0]:
            free.sort(key=lambda c: not c.resident)  # stable: rendezvous order within holders and within the rest
        busy = sorted((c for c in ranked if c.queue >= limit), key=lambda c: c.queue)
        return [c.id for c in [*free, *busy]]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}|{replica}".encode(), digest_size=8).digest()


def hint(delta: str) -> str:
    """How a delta is named in routing stats, which are broadcast to every router: short."""
    return delta[:HINT_CHARACTERS]


class DeltaRouter(RequestRouter):
    """The policy, in Ray Serve's terms. The delta travels as the request's `multiplexed_model_id`."""

    def initialize_state(self, **kwargs: Any) -> None:
        """The fields of Policy, from `request_router_kwargs`."""
        self._policy = Policy(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica per rank, best first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else a full cluster is retried without a pause
        key = pending_request.metadata.multiplexed_model_id or None
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        seen = [self._candidate(name, replica, key) for name, replica in by_id.items()]
        return [[by_id[name]] for name in self._policy.order(key, seen)]

    def _candidate(self, name: str, replica: RunningReplica, key: str | None) -> Candidate:
        seen = self.replica_queue_len_cache.get(replica.replica_id) or 0
        queue = max(seen, replica.routing_stats.get(LOAD, 0))
        resident = key is not None and hint(key) in replica.routing_stats.get(RESIDENT, ())
        return Candidate(name, queue, resident)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Pick in the caller's own task. The base class indexes waiting requests by an id that concurrent calls made
        inside one Serve request share, so that some of them would wait for ever."""
        attempt = 0
        while True:
            while not self._replicas:
                self._replicas_updated_event.clear()
                await self._replicas_updated_event.wait()
            for rank in await self.choose_replicas(self._replicas_list, pending_request):
                replica = await self._select_from_candidate_replicas(rank, attempt)
                if replica is not None:
                    return replica
            await self._backoff(attempt)
            attempt += 1
