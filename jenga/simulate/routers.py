"""How a request finds its replica: Jenga's rule and what others do, for simulated clusters.

All see the same, exact and without delay: queues, memory in use, and what each replica has cached.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jenga.hits import Hit
from jenga.routing.placement import Ledger, Prices, State, costs, rank
from jenga.traces import TraceRequest

IMBALANCE = 10
"""Requests by which the longest queue may exceed the shortest before `PrefixText` looks at queues alone."""
MATCH_RATE = 0.1
"""Part of a prompt that must be known for `PrefixText` to follow it."""


class Replica(Protocol):
    """What a router may know of a replica when a request arrives."""

    @property
    def queue(self) -> int:
        """Requests that run or wait."""

    @property
    def used(self) -> float:
        """Part of the KV memory that live requests hold, 0 to 1."""

    def hit(self, dense_only: bool = False) -> Hit:
        """Of the request's prompt: by the hit rule, in the cache and in what requests on their way will leave there.

        `dense_only`: of full attention alone, as stored now.
        """


class Router(ABC):
    """Chooses a replica for each request as it arrives."""

    name: str
    predicted: int | None = None
    """Tokens that the latest choice expects to be found; None if the router does not say."""

    @abstractmethod
    def choose(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        """Number of the replica that gets `request`."""

    def first_token(self, request: int, replica: int) -> None:  # noqa: B027  # few need to know
        """The prompt with this serial number is computed."""

    def finished(self, request: int, replica: int) -> None:  # noqa: B027
        """It has its answer, or was rejected."""


class ByCost(Router):
    """`jenga.routing.placement` on each replica's hit."""

    def __init__(self, name: str, dense_only: bool, seed: int, prices: Prices | None = None) -> None:
        self.name = name
        self._dense_only = dense_only
        self._prices = prices or Prices()
        self._ledger: Ledger[int] = Ledger()
        self._rng = random.Random(seed)

    def choose(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        hits = {i: replica.hit(self._dense_only) for i, replica in enumerate(replicas)}
        states = {i: State(replica.queue, replica.used) for i, replica in enumerate(replicas)}
        cost = costs(request.prompt_tokens, hits, states, self._ledger, self._prices)
        chosen = rank(cost, states, self._prices, self._rng)[0]
        self._ledger.add(chosen, str(request.serial), request.prompt_tokens - hits[chosen].tokens)
        self.predicted = hits[chosen].tokens
        return chosen

    def first_token(self, request: int, replica: int) -> None:
        self._ledger.settle(str(request))

    def finished(self, request: int, replica: int) -> None:
        self._ledger.settle(str(request))


class PowerOfTwo(Router):
    """The shorter queue of two replicas picked at random."""

    name = "p2c"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        return _shorter(self._rng.sample(range(len(replicas)), min(2, len(replicas))), replicas)


class PrefixText(Router):
    """Ray's PrefixCacheAffinityRouter (Ray 2.60): a tree of what was sent where, never told of what was evicted.

    While queues differ by at most `imbalance` requests, a prompt goes where its longest known prefix went; if that is
    less than `match_rate` of it, to the replica that was sent the least text.  Otherwise power of two choices.
    `match_rate` (0.1) and no eviction from the tree are Ray's defaults.  Its default `imbalance` is infinite.
    """

    name = "prefix_text"

    def __init__(self, replicas: int, seed: int, imbalance: float = IMBALANCE, match_rate: float = MATCH_RATE) -> None:
        self._imbalance = imbalance
        self._match_rate = match_rate
        self._owners: dict[int, set[int]] = {}  # block -> replicas that were sent it
        self._sent = [0] * replicas  # tokens in the tree
        self._fallback = PowerOfTwo(seed)

    def choose(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        queues = [replica.queue for replica in replicas]
        if max(queues) - min(queues) > self._imbalance:
            chosen = self._fallback.choose(request, replicas)
        else:
            chosen = _shorter(self._candidates(request), replicas)
        for block in request.blocks:
            owners = self._owners.setdefault(block, set())
            if chosen not in owners:
                owners.add(chosen)
                self._sent[chosen] += request.block_tokens
        return chosen

    def _candidates(self, request: TraceRequest) -> list[int]:
        known = 0
        for block in request.blocks:
            if block not in self._owners:
                break
            known += 1
        if known * request.block_tokens < self._match_rate * request.prompt_tokens:
            least = min(self._sent)
            return [i for i, sent in enumerate(self._sent) if sent == least]
        return sorted(self._owners[request.blocks[known - 1]])


class RoundRobin(Router):
    """One after the other."""

    name = "round_robin"

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        chosen, self._next = self._next % len(replicas), self._next + 1
        return chosen


def _shorter(candidates: Sequence[int], replicas: Sequence[Replica]) -> int:
    return min(candidates, key=lambda i: replicas[i].queue)


ROUTERS: Mapping[str, Callable[[int, int], Router]] = {
    "jenga": lambda replicas, seed: ByCost("jenga", False, seed),
    "kv_full_only": lambda replicas, seed: ByCost("kv_full_only", True, seed),
    "prefix_text": PrefixText,
    "p2c": lambda replicas, seed: PowerOfTwo(seed),
    "round_robin": lambda replicas, seed: RoundRobin(),
}
"""Makes a router for a number of replicas and a seed, by name."""
