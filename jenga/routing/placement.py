"""Which replica finishes a request first, given what each has cached and has to do.

Pure Python without Ray.  All costs are in tokens of prompt to compute, the one unit that engines of every speed share:

- what is not cached there and must be computed: this request waits for it, and so do all in progress beside it;
- what is not stored there at all: it takes the place of something that others could find;
- what this router has sent there before and is not finished (`Ledger`): it is computed first;
- a fixed price for each request in progress: each delays the other, since they share the steps;
- a share of its own work where live requests hold nearly all KV memory, and it would wait or push others out.

A hot prefix spreads by itself: once the replica that has it is busy for longer than computing the prefix elsewhere
takes, another replica is cheaper, computes it, and has it too.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from jenga.hits import Hit

Replica = TypeVar("Replica", bound=Hashable)

NOTHING = Hit(0, 0, None)

MEMORY = 1_000_000
"""Tokens per replica after which what was stored before counts half."""

CROWDED = 0.8
"""Part of the KV memory from which on a new request is likely to wait, or to push others out."""


@dataclass(frozen=True)
class Prices:
    """Constants of the placement, in tokens of prompt.

    request: what it costs to come to one request in progress: each has a share of its decoding in the other's steps.
    compute: what each token to compute costs this request; 1 is the price of one that is computed before it.
    behind: what it costs beyond that for each request in progress on a replica, on average: as many wait for it.  Idle
        replicas are used although they must compute a prompt anew; busy ones keep to what they have.
    pressure: what each token to compute costs more where no KV memory is left (nothing up to `CROWDED`).
    store: what each token costs that some layers there have not stored yet, as a part of what computing it costs (it
        takes the place of one that will have to be computed again), where as much was stored lately as on other
        replicas; more where more was, since the cache there forgets sooner.  A replica may have stored more than
        it can resume (`jenga.hits.Hit.furthest`: the attention pages are there, the state is not).  Computed there,
        those tokens take no new memory and leave the missing state, so the next request with that prefix finds both.
    slack: replicas this close to the cheapest are as good: among them the least loaded is taken.
    """

    request: float = 64.0
    compute: float = 1.0
    behind: float = 1.0
    pressure: float = 1.0
    store: float = 0.5
    slack: float = 16.0


@dataclass(frozen=True)
class State:
    """What a router knows of one replica, apart from its cache."""

    queue: int = 0
    """Requests in progress, by anybody."""
    used: float = 0.0
    """Part of the KV memory that live requests hold, 0 to 1."""


class Ledger(Generic[Replica]):
    """Tokens of prompt that replicas still have to compute for requests sent by this router."""

    def __init__(self) -> None:
        self._owed: dict[str, tuple[Replica, int]] = {}
        self._total: dict[Replica, int] = {}
        self._stored: dict[Replica, float] = {}

    def add(self, replica: Replica, request: str, tokens: int) -> None:
        """`request` was sent to `replica`, which must compute `tokens` of its prompt."""
        self.settle(request)
        self._owed[request] = replica, tokens
        self._total[replica] = self._total.get(replica, 0) + tokens
        self._stored[replica] = self._stored.get(replica, 0.0) + tokens
        if sum(self._stored.values()) > MEMORY * len(self._stored):
            self._stored = {each: tokens / 2 for each, tokens in self._stored.items()}

    def settle(self, request: str) -> None:
        """`request` is done, or computes no prompt any more.  Unknown ones are no error."""
        replica, tokens = self._owed.pop(request, (None, 0))
        if replica in self._total:
            self._total[replica] -= tokens

    def owed(self, replica: Replica) -> int:
        """Tokens of prompt not known to be computed."""
        return self._total.get(replica, 0)

    def stored(self, replica: Replica) -> float:
        """Tokens of prompt that `replica` has had to store lately: the more, the sooner it evicts what it has."""
        return self._stored.get(replica, 0.0)

    def keep(self, replicas: Mapping[Replica, object]) -> None:
        """Forget every other replica."""
        gone = self._total.keys() - replicas.keys()
        if gone:
            self._owed = {request: owed for request, owed in self._owed.items() if owed[0] not in gone}
        for replica in gone:
            self._stored.pop(replica, None)
            del self._total[replica]


def costs(
    prompt: int, hits: Mapping[Replica, Hit], states: Mapping[Replica, State], ledger: Ledger[Replica], prices: Prices
) -> dict[Replica, float]:
    """Cost of a prompt of `prompt` tokens on each replica of `states`; one without a hit has nothing cached."""
    found = {}
    stored = {replica: ledger.stored(replica) for replica in states}
    mean = sum(stored.values()) / max(1, len(stored))
    compute = prices.compute + prices.behind * sum(state.queue for state in states.values()) / max(1, len(states))
    for replica, state in states.items():
        hit = hits.get(replica, NOTHING)
        crowded = max(0.0, state.used - CROWDED) / (1 - CROWDED)
        found[replica] = (
            (prompt - hit.tokens) * (compute + prices.pressure * crowded)
            + (prompt - hit.furthest) * prices.store * compute * (stored[replica] / mean if mean else 1.0)
            + ledger.owed(replica)
            + prices.request * state.queue
        )
    return found


def rank(
    cost: Mapping[Replica, float], states: Mapping[Replica, State], prices: Prices, rng: random.Random
) -> list[Replica]:
    """Replicas, best first: cheapest, and among those about as cheap as the best one the least loaded."""
    if not cost:
        return []
    best = min(cost.values())
    replicas = list(cost)
    rng.shuffle(replicas)
    near = [r for r in replicas if cost[r] <= best + prices.slack]
    near.sort(key=lambda r: states[r].queue)
    return near + sorted((r for r in replicas if cost[r] > best + prices.slack), key=lambda r: cost[r])
