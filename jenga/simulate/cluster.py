"""A simulated cluster: engines on a common clock, and a router that places each request as it arrives.

The engines share nothing but the time.  Before a request is placed every engine takes the steps that start before
the request arrives, so a router sees the caches as they are then (at most one step ahead).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jenga.hits import Hit
from jenga.layers import LayerType
from jenga.prefix_cache import Keys
from jenga.routing.placement import NOTHING
from jenga.simulate.clairvoyant import hit_bound
from jenga.simulate.cost import StepCost
from jenga.simulate.engine import Limits, Progress, Simulation
from jenga.simulate.report import Percentiles, SimulationResult
from jenga.simulate.routers import ROUTERS, Router
from jenga.strategies import Plan
from jenga.traces import TraceRequest


class UnknownRouterError(ValueError):
    """No router of that name; the message lists those there are."""


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica did."""

    requests: int
    hit_tokens: int
    computed_tokens: int
    """Of prompts and answers, again after preemptions included."""
    preemptions: int
    busy_s: float
    """Simulated seconds spent in steps."""


@dataclass(frozen=True)
class ClusterResult:
    """One trace under one router."""

    router: str
    strategy: str
    model: str
    memory_bytes: int
    """Of each replica."""
    requests: int
    rejected: int
    """Requests that do not fit into an empty buffer."""
    seconds: float
    """Simulated time until the last request was done."""
    prompt_tokens: int
    output_tokens: int
    hit_tokens: int
    """Prompt tokens found in the caches when requests were first admitted."""
    computed_prompt_tokens: int
    """Prompt tokens not found in the cache of the replica chosen."""
    recomputed_prompt_tokens: int
    """Those of them that some replica had been sent before: unlimited memory, shared by all, would have spared them."""
    elsewhere_prompt_tokens: int
    """Those of them that another replica had at the placement: an oracle of all caches recomputes the rest too."""
    preempted_tokens: int
    """Tokens computed again after preemptions."""
    preemptions: int
    ttft_s: Percentiles
    """Time to first token, from arrival."""
    exact_share: float | None
    """Share of requests that found as many tokens as the router predicted; None if it predicts nothing."""
    overpredicted_tokens: int | None
    """Tokens promised and not found."""
    underpredicted_tokens: int | None
    """Tokens found beyond the promise."""
    replicas: tuple[ReplicaLoad, ...]

    @property
    def requests_per_s(self) -> float:
        """Requests finished per simulated second."""
        return (self.requests - self.rejected) / self.seconds if self.seconds else 0.0

    @property
    def load_spread(self) -> float:
        """Tokens computed by the busiest replica over the mean of all."""
        tokens = [r.computed_tokens for r in self.replicas]
        return max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else 1.0

    @property
    def busy_share(self) -> float:
        """Share of the replicas' time that was spent in steps."""
        return sum(r.busy_s for r in self.replicas) / (self.seconds * len(self.replicas)) if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, derived figures included."""
        return asdict(self) | {
            "requests_per_s": self.requests_per_s,
            "load_spread": self.load_spread,
            "busy_share": self.busy_share,
        }


class _Replica:
    """An engine as the router sees it, and the record of what it did with the router's requests."""

    def __init__(self, number: int, engine: Simulation, cluster: _Cluster) -> None:
        self.number = number
        self.engine = engine
        self._cluster = cluster
        self._hits: dict[bool, Hit] = {}  # of the arriving request
        self._coming: list[Counter[int]] = [Counter() for _ in engine.cache.groups]
        self._left: dict[int, list[list[int]]] = {}  # what requests on their way will leave, by serial number

    @property
    def queue(self) -> int:
        return self.engine.queue

    @property
    def used(self) -> float:
        return self.engine.used

    def advance(self, now: float) -> None:
        """Take the steps before `now`, when another request arrives."""
        self.engine.advance(now)
        self._hits.clear()

    def hit(self, dense_only: bool = False) -> Hit:
        request, keys = self._cluster.arriving
        if request.image_tokens or not self._cluster.limits.prefix_caching:
            return NOTHING
        if dense_only not in self._hits:
            coming = None if dense_only else self._coming
            self._hits[dense_only] = self.engine.cache.hit(keys, request.prompt_tokens - 1, dense_only, coming)
        return self._hits[dense_only]

    def submit(self) -> None:
        """The arriving request was placed here."""
        request, keys = self._cluster.arriving
        if not request.image_tokens and self._cluster.limits.prefix_caching:
            left = self._left[request.serial] = self.engine.cache.leaves(keys, self.hit(), request.prompt_tokens)
            for coming, pages in zip(self._coming, left, strict=True):
                coming.update(pages)
        self.engine.submit(request, keys)

    def computed(self, serial: int) -> None:
        """A prompt is computed, or was rejected: what it leaves is cached, or never will be."""
        for coming, pages in zip(self._coming, self._left.pop(serial, ()), strict=False):
            for page in pages:
                coming[page] -= 1
                if not coming[page]:
                    del coming[page]


class _Record:
    """`jenga.simulate.engine.Watch` of one replica."""

    def __init__(self, number: int, cluster: _Cluster) -> None:
        self._number = number
        self._cluster = cluster

    def admitted(self, serial: int, hit_tokens: int) -> None:
        self._cluster.found[serial] = hit_tokens

    def first_token(self, serial: int, seconds: float) -> None:
        self._cluster.ttft.append(seconds)
        self._cluster.replicas[self._number].computed(serial)
        self._cluster.router.first_token(serial, self._number)

    def finished(self, serial: int, rejected: bool) -> None:
        self._cluster.done += 1
        self._cluster.replicas[self._number].computed(serial)
        self._cluster.router.finished(serial, self._number)
        if self._cluster.progress is not None:
            self._cluster.progress(self._cluster.done)


class _Cluster:
    def __init__(self, router: Router, limits: Limits, progress: Progress | None) -> None:
        self.router = router
        self.limits = limits
        self.progress = progress
        self.done = 0
        self.ttft: list[float] = []
        self.found: dict[int, int] = {}
        self.predicted: dict[int, int] = {}
        self.elsewhere = 0
        self.arriving: tuple[TraceRequest, Keys]
        self.replicas: list[_Replica] = []

    def run(self, trace: Sequence[TraceRequest]) -> None:
        for request in sorted(trace, key=lambda r: r.arrival_s):
            for replica in self.replicas:
                replica.advance(request.arrival_s)
            keys = self.replicas[0].engine.keys(request)
            self.arriving = (request, keys)
            chosen = self.router.choose(request, self.replicas)
            if self.router.predicted is not None:
                self.predicted[request.serial] = self.router.predicted
            best = max(replica.hit().tokens for replica in self.replicas)
            self.elsewhere += best - self.replicas[chosen].hit().tokens
            self.replicas[chosen].submit()
        for replica in self.replicas:
            replica.engine.advance()


def simulate_cluster(
    plan: Plan,
    types: Sequence[LayerType],
    trace: Sequence[TraceRequest],
    *,
    replicas: int,
    router: str | Router,
    seed: int = 0,
    cost: StepCost | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ClusterResult:
    """Serve `trace` on `replicas` engines, each with the memory of `plan`, the plan of a model of layer `types`.

    Raises:
        UnknownRouterError: no router of that name.
        ValueError: no replicas.
    """
    if replicas < 1:
        raise ValueError(f"a cluster of {replicas} replicas serves nothing; give at least 1")
    if isinstance(router, str):
        if router not in ROUTERS:
            raise UnknownRouterError(f"unknown router {router!r}; known: {', '.join(ROUTERS)}")
        router = ROUTERS[router](replicas, seed)
    # The buffer by cause is not reported for a cluster: no samples, which cost as much as a step of every request.
    cluster = _Cluster(router, limits or Limits(), progress)
    for number in range(replicas):
        watch = _Record(number, cluster)
        engine = Simulation(plan, types, cost=cost, limits=cluster.limits, watch=watch, sampling=False)
        cluster.replicas.append(_Replica(number, engine, cluster))
    cluster.run(trace)
    return _result(plan, trace, cluster)


def seen_before(trace: Sequence[TraceRequest]) -> int:
    """Prompt tokens that an earlier request of the trace had too: hits with unlimited memory shared by all."""
    return hit_bound(sorted(trace, key=lambda r: r.arrival_s), 0.0, 0).unlimited


def _result(plan: Plan, trace: Sequence[TraceRequest], cluster: _Cluster) -> ClusterResult:
    results = [replica.engine.result() for replica in cluster.replicas]

    def total(value: str) -> int:
        return sum(getattr(result, value) for result in results)

    misses = [
        cluster.predicted[serial] - found for serial, found in cluster.found.items() if serial in cluster.predicted
    ]
    prompts, hits = total("prompt_tokens"), total("hit_tokens")
    return ClusterResult(
        router=cluster.router.name,
        strategy=plan.strategy,
        model=plan.model,
        memory_bytes=plan.memory_bytes,
        requests=len(trace),
        rejected=total("rejected"),
        seconds=max(result.seconds for result in results),
        prompt_tokens=prompts,
        output_tokens=total("output_tokens"),
        hit_tokens=hits,
        computed_prompt_tokens=prompts - hits,
        recomputed_prompt_tokens=max(0, seen_before(trace) - hits),
        elsewhere_prompt_tokens=cluster.elsewhere,
        preempted_tokens=total("recomputed_tokens"),
        preemptions=total("preemptions"),
        ttft_s=Percentiles.of(cluster.ttft),
        exact_share=sum(miss == 0 for miss in misses) / len(misses) if misses else None,
        overpredicted_tokens=sum(max(0, miss) for miss in misses) if misses else None,
        underpredicted_tokens=sum(max(0, -miss) for miss in misses) if misses else None,
        replicas=tuple(
            _load(replica.engine, result) for replica, result in zip(cluster.replicas, results, strict=True)
        ),
    )


def _load(engine: Simulation, result: SimulationResult) -> ReplicaLoad:
    computed = result.prompt_tokens - result.hit_tokens + result.recomputed_tokens + result.output_tokens
    return ReplicaLoad(result.requests, result.hit_tokens, computed, result.preemptions, engine.busy_s)
