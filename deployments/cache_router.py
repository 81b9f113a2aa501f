"""Ray Serve request router that knows what every replica has cached, layer type by layer type."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments import keys
from deployments.events import EventFeed, Source
from deployments.placement import KV_IN_USE
from deployments.router_metrics import RouterMetrics
from jenga.hits import Hit
from jenga.routing import BlockIndex
from jenga.routing.placement import Ledger, Prices, State, costs, rank

logger = logging.getLogger("ray.serve")

KV_STREAM = "kv_stream"
"""Key of a replica's routing statistics: where its KV events are (`deployments.events.Source`)."""


class CacheAwareRouter(RequestRouter):
    """Sends each request where it will be done first: `jenga.routing.placement` on hits from `jenga.routing`.

    Each handle has a router of its own, with an index of its own; nothing is asked of others on a request's way.
    Requests whose tokens are unknown, and all of them while no replica's cache is known, go to the less loaded of two
    replicas, and are counted.
    """

    def initialize_state(self, hash_algorithm: str = "sha256", **prices: Any) -> None:
        """Ray calls this with ``request_router_kwargs``: the hash algorithm, and the fields of `Prices`."""
        self._prices = Prices(**prices)
        self._hash = keys.hash_function(hash_algorithm)
        self._feed = EventFeed(BlockIndex())
        self._ledger: Ledger[ReplicaID] = Ledger()
        self._sent: dict[str, dict[ReplicaID, int]] = {}
        self._rng = random.Random()
        self._metrics = RouterMetrics()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas came, went, or told something new."""
        super().update_replicas(replicas)
        self._ledger.keep({replica.replica_id: None for replica in replicas})
        sources = {}
        for replica in replicas:
            source = Source.from_dict((replica.routing_stats or {}).get(KV_STREAM))
            if source is not None:
                sources[replica.replica_id.unique_id] = source
        self._event_loop.call_soon_threadsafe(self._feed.follow, sources)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Ray takes the least loaded of the first rank that has room."""
        if pending_request is not None:
            # Otherwise Ray would ask again without a pause while every replica is full.
            pending_request.routing_context.should_backoff = True
        if not candidate_replicas:
            return []
        started = time.perf_counter()
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        states = {id_: self._state(id_, replica) for id_, replica in by_id.items()}
        body = pending_request.args[0] if pending_request is not None and pending_request.args else None
        tokens = keys.token_ids(body)
        hits = self._hits(tokens, getattr(body, "cache_salt", None)) if tokens else None
        if hits is None or tokens is None:
            self._metrics.fallback("no tokens" if not tokens else "no index")
            two = self._rng.sample(list(by_id), min(2, len(by_id)))
            two.sort(key=lambda id_: states[id_].queue)
            return [[by_id[id_] for id_ in two], candidate_replicas]
        cached = {id_: hits[id_.unique_id].tokens for id_ in by_id if id_.unique_id in hits}
        order = rank(costs(len(tokens), cached, states, self._ledger, self._prices), states, self._prices, self._rng)
        if pending_request is not None:
            keys.predict(body, {id_.unique_id: tokens_ for id_, tokens_ in cached.items()})
            self._sent[pending_request.metadata.internal_request_id] = {
                id_: len(tokens) - cached.get(id_, 0) for id_ in by_id
            }
        self._metrics.decided(time.perf_counter() - started, self._feed)
        # One by one: Ray takes the next where the best has no room, and all at last.
        return [*([by_id[id_]] for id_ in order[:3]), candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The request is on its way: its prompt is work that the replica has to do."""
        request = pending_request.metadata.internal_request_id
        missing = self._sent.pop(request, {}).get(replica_id)
        if missing is not None:
            self._ledger.add(replica_id, request, missing)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request is done, one way or another."""
        self._ledger.settle(replica_id, internal_request_id)
        self._sent.pop(internal_request_id, None)

    def _state(self, replica_id: ReplicaID, replica: RunningReplica) -> State:
        used = (replica.routing_stats or {}).get(KV_IN_USE)
        return State(self.replica_queue_len_cache.get(replica_id) or 0, used if isinstance(used, float) else 0.0)

    def _hits(self, tokens: list[int], salt: str | None) -> dict[str, Hit] | None:
        """Hits by replica, None if no replica's cache is known."""
        index = self._feed.index
        rule = next((r for r in map(index.rule, index.replicas()) if r is not None), None)
        if rule is None:
            return None
        return index.hits(keys.block_keys(tokens, rule, self._hash, salt), len(tokens))
