"""Ray Serve request router that knows what every replica has cached, layer type by layer type."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments import keys
from deployments.autoscaling import KV_IN_USE
from deployments.events import EventFeed, Source
from deployments.router_metrics import RouterMetrics
from jenga.hits import Hit
from jenga.routing import BlockIndex
from jenga.routing.index import NO_HIT
from jenga.routing.placement import Ledger, Prices, State, costs, rank
from jenga.routing.slow_start import SlowStart

logger = logging.getLogger("ray.serve")

KV_STREAM = "kv_stream"
"""Key of a replica's routing statistics: where its KV events are (`deployments.events.Source`)."""


# A placed request that Ray has not sent by then was given up by its client.
_GIVEN_UP_S = 10.0


@dataclass(frozen=True)
class _Prompt:
    """What is known of a prompt when it is placed."""

    tokens: list[int]
    keys: dict[tuple[int, str], list[int]]
    """Its blocks' names, by `HitRule.naming`."""
    hits: dict[str, Hit]


@dataclass(frozen=True)
class _Booked:
    """A request that was placed and that Ray has not sent yet."""

    time: float
    replica: ReplicaID
    prompt: _Prompt


class CacheAwareRouter(RequestRouter):
    """Sends each request where it will be done first: `jenga.routing.placement` on hits from `jenga.routing`.

    Each handle has a router of its own, with an index of its own; nothing is asked of others on a request's way.
    Requests whose tokens are unknown, and all of them while no replica's cache is known, go to the less loaded of two
    replicas, and are counted.
    """

    def initialize_state(self, hash_algorithm: str = "sha256", slow_start: float = 0.0, **prices: Any) -> None:
        """Ray calls this with ``request_router_kwargs``: hash algorithm, `SlowStart`'s seconds, fields of `Prices`."""
        self._prices = Prices(**prices)
        self._slow_start: SlowStart[ReplicaID] = SlowStart(slow_start)
        self._hash = keys.hash_function(hash_algorithm)
        self._feed = EventFeed(BlockIndex())
        self._ledger: Ledger[ReplicaID] = Ledger()
        self._booked: dict[str, _Booked] = {}
        self._rng = random.Random()
        self._metrics = RouterMetrics(self._feed)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas came, went, or told something new."""
        super().update_replicas(replicas)
        alive = {replica.replica_id: None for replica in replicas}
        self._ledger.keep(alive)
        self._slow_start.keep(alive)
        sources = {}
        for replica in replicas:
            source = Source.from_dict((replica.routing_stats or {}).get(KV_STREAM))
            if source is not None:
                sources[replica.replica_id.unique_id] = source
        self._event_loop.call_soon_threadsafe(self._feed.follow, sources)
        self._event_loop.call_soon_threadsafe(self._metrics.start)

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
        again = None if pending_request is None else pending_request.metadata.internal_request_id
        if again is not None and self._booked.pop(again, None) is not None:
            self._settle(again)  # what it left nowhere must not draw it there
        self._give_up()
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        placed = Counter(booked.replica for booked in self._booked.values())  # and not sent yet
        states = {id_: self._state(id_, replica, placed[id_]) for id_, replica in by_id.items()}
        body = pending_request.args[0] if pending_request is not None and pending_request.args else None
        tokens = keys.token_ids(body)
        reason, order = "no tokens" if not tokens else "no index", None
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            # Its blocks are named by the folder, too, to which a replica has downloaded it.
            reason, tokens = "adapter", None
        try:
            order = self._place(tokens, states, body, pending_request) if tokens else None
        except Exception:
            # Raised out of here, it would leave the request waiting for ever.
            logger.exception("the index failed: this request goes by load alone")
            reason = "index failed"
        if order is None:
            self._metrics.fallback(reason)
            taking = self._taking(states)
            two = self._rng.sample(taking, min(2, len(taking)))
            two.sort(key=lambda id_: states[id_].queue)
            return [[by_id[id_] for id_ in two], candidate_replicas]
        self._metrics.decided(time.perf_counter() - started)
        # One by one: Ray takes the next where the best has no room, and all at last.
        return [*([by_id[id_]] for id_ in order[:3]), candidate_replicas]

    def _place(
        self,
        tokens: list[int],
        states: Mapping[ReplicaID, State],
        body: Any,
        pending_request: PendingRequest | None,
    ) -> list[ReplicaID] | None:
        """Replicas in order of cost, the best one booked; None if no replica's cache is known."""
        request = None if pending_request is None else pending_request.metadata.internal_request_id
        for computed in self._feed.index.take_computed():
            self._ledger.settle(computed)
        prompt = self._look_up(tokens, getattr(body, "cache_salt", None))
        if prompt is None:
            return None
        cached = {id_: prompt.hits[id_.unique_id] for id_ in states if id_.unique_id in prompt.hits}
        order = rank(costs(len(tokens), cached, states, self._ledger, self._prices), states, self._prices, self._rng)
        taking = set(self._taking(states))
        order.sort(key=lambda id_: id_ not in taking)
        if request is not None:
            keys.predict(body, {id_.unique_id: hit.tokens for id_, hit in cached.items()})
            self._book(request, order[0], prompt)
        return order

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The request is on its way, seldom to another replica than the best."""
        request = pending_request.metadata.internal_request_id
        booked = self._booked.pop(request, None)
        if booked is not None and booked.replica != replica_id:
            self._book(request, replica_id, booked.prompt)
            del self._booked[request]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request is done, one way or another."""
        self._settle(internal_request_id)
        self._booked.pop(internal_request_id, None)

    def _book(self, request: str, replica: ReplicaID, prompt: _Prompt) -> None:
        """From now on the prompt is work that the replica has to do, and what it leaves can be hit there.

        At once, since those that come in the same moment are placed before Ray has sent this one.
        """
        hit = prompt.hits.get(replica.unique_id, NO_HIT)
        self._booked[request] = _Booked(time.monotonic(), replica, prompt)
        self._ledger.add(replica, request, len(prompt.tokens) - hit.tokens)
        index = self._feed.index
        rule = index.rule(replica.unique_id)
        if rule is not None and (names := prompt.keys.get(rule.naming)) is not None:
            index.book(replica.unique_id, request, prompt.tokens, names, hit)
        else:
            index.settle(request)

    def _give_up(self) -> None:
        """Forget requests that were placed long ago and never sent: their clients left while all replicas were full."""
        now = time.monotonic()
        while self._booked and now - (first := next(iter(self._booked.items())))[1].time > _GIVEN_UP_S:
            self._settle(first[0])
            del self._booked[first[0]]

    def _settle(self, request: str) -> None:
        self._ledger.settle(request)
        self._feed.index.settle(request)

    def _taking(self, states: Mapping[ReplicaID, State]) -> list[ReplicaID]:
        """Replicas that may be given one more."""
        return self._slow_start.open({id_: state.queue for id_, state in states.items()})

    def _state(self, replica_id: ReplicaID, replica: RunningReplica, placed: int) -> State:
        used = (replica.routing_stats or {}).get(KV_IN_USE)
        queue = self.replica_queue_len_cache.get(replica_id) or 0
        return State(queue + placed, used if isinstance(used, float) else 0.0)

    def _look_up(self, tokens: list[int], salt: str | None) -> _Prompt | None:
        """The prompt's blocks and its hits by replica, None if no replica's cache is known."""
        index = self._feed.index
        names: dict[tuple[int, str], list[int]] = {}
        hits: dict[str, Hit] = {}
        for rule, alike in index.namings():  # several while an update rolls out
            names[rule.naming] = keys.block_keys(tokens, rule, self._hash, salt)
            found = index.hits(names[rule.naming], len(tokens))
            hits |= {replica: hit for replica, hit in found.items() if replica in alike}
        return _Prompt(tokens, names, hits) if names else None
