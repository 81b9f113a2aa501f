"""Ray Serve request router around ``deployments.placement``."""

from collections.abc import Sequence
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.placement import Policy, PrefixPlacement, chunk_names, load_of, prompt_of
from jenga.routing.slow_start import SlowStart


class PrefixAffinityRouter(RequestRouter):
    """Sends a request to the replica that knows the longest prefix of it, unless that one is busy.

    Each handle has its own router and learns from the requests that pass through it.
    """

    def initialize_state(self, slow_start: float = 0.0, **policy: Any) -> None:
        """Ray calls this with ``request_router_kwargs``: `SlowStart`'s seconds, and the fields of ``Policy``."""
        self._policy = Policy(**policy)
        self._slow_start: SlowStart[ReplicaID] = SlowStart(slow_start)
        self._placement: PrefixPlacement[ReplicaID] = PrefixPlacement(self._policy)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Ray takes the least loaded of the first rank that has room."""
        if pending_request is not None:
            # Otherwise Ray would ask again without a pause while every replica is full.
            pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        queues = {id_: self.replica_queue_len_cache.get(id_) or 0 for id_ in by_id}
        loads = {id_: load_of(queues[id_], by_id[id_].routing_stats or {}) for id_ in self._slow_start.open(queues)}
        ranks = self._placement.rank(self._names(pending_request), loads)
        return [[by_id[replica_id] for replica_id in rank] for rank in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember where the prompt went."""
        self._placement.record(self._names(pending_request), replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas came or went."""
        super().update_replicas(replicas)
        self._placement.keep(replica.replica_id for replica in replicas)
        self._slow_start.keep(replica.replica_id for replica in replicas)

    def _names(self, pending_request: PendingRequest | None) -> Sequence[bytes]:
        if pending_request is None or not pending_request.args:
            return ()
        prompt = prompt_of(pending_request.args[0])
        return chunk_names(prompt, self._policy) if prompt is not None else ()
