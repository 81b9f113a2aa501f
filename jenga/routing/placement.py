"""Which replica finishes a request first, given what each has cached and has to do.

Pure Python without Ray.  All costs are in tokens of prompt to compute, the one unit that engines of every speed share:

- what is not cached there and must be computed;
- what this router has sent there before and is not finished (`Ledger`): it is computed first;
- a fixed price for each request in progress, whose decoding shares the steps;
- a share of its own work where live requests hold nearly all KV memory, and it would wait or push others out.

A hot prefix spreads by itself: once the replica that has it is busy for longer than computing the prefix elsewhere
takes, another replica is cheaper, computes it, and has it too.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Replica = TypeVar("Replica", bound=Hashable)

CROWDED = 0.8
"""Part of the KV memory from which on a new request is likely to wait, or to push others out."""


@dataclass(frozen=True)
class Prices:
    """Constants of the placement, in tokens of prompt.

    request: what one request in progress costs another one (the share of its decoding in the steps of a prefill).
    pressure: what each token to compute costs more where no KV memory is left (nothing up to `CROWDED`).
    slack: replicas this close to the cheapest are as good: among them the least loaded is taken.
    """

    request: float = 32.0
    pressure: float = 1.0
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
        self._owed: dict[Replica, dict[str, int]] = {}
        self._total: dict[Replica, int] = {}

    def add(self, replica: Replica, request: str, tokens: int) -> None:
        """`request` was sent to `replica`, which must compute `tokens` of its prompt."""
        self.settle(replica, request)
        self._owed.setdefault(replica, {})[request] = tokens
        self._total[replica] = self._total.get(replica, 0) + tokens

    def settle(self, replica: Replica, request: str) -> None:
        """`request` is done, or computes no prompt any more.  Unknown ones are no error."""
        self._total[replica] = self._total.get(replica, 0) - self._owed.get(replica, {}).pop(request, 0)

    def owed(self, replica: Replica) -> int:
        """Tokens of prompt not known to be computed."""
        return self._total.get(replica, 0)

    def keep(self, replicas: Mapping[Replica, object]) -> None:
        """Forget every other replica."""
        for gone in self._total.keys() - replicas.keys():
            self._owed.pop(gone, None)
            del self._total[gone]


def costs(
    prompt: int, hits: Mapping[Replica, int], states: Mapping[Replica, State], ledger: Ledger[Replica], prices: Prices
) -> dict[Replica, float]:
    """Cost of a prompt of `prompt` tokens on each replica of `states`; one without a hit has nothing cached."""
    found = {}
    for replica, state in states.items():
        new = prompt - hits.get(replica, 0)
        crowded = max(0.0, state.used - CROWDED) / (1 - CROWDED)
        found[replica] = new * (1 + prices.pressure * crowded) + ledger.owed(replica) + prices.request * state.queue
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
