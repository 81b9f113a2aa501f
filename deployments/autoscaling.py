"""How many replicas the requests need, by the KV memory that they hold, their waiting, and the rate at which they come.

Pure, and nothing but the standard library is imported: Ray sends this module to its controller by value.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

KV_IN_USE, RESIDENT, WAITING = "jenga_kv_in_use", "jenga_resident", "jenga_waiting"
"""What a replica reports: the part of its KV memory that live requests hold (to routers too), requests that hold some,
and requests that wait in its engine (preempted ones wait again)."""

ADMITTED = "jenga_admitted"
"""What it reports too: how often a request was admitted, in all."""

GROWTH = 4.0
"""Most replicas that one replica's load can ask for, itself included: rates of few requests are rough."""


@dataclass(frozen=True)
class Load:
    """What one replica reported, on average over the look-back time."""

    kv_in_use: float
    """Part of the KV memory that live requests hold, 0 to 1."""
    resident: float
    """Requests that hold KV memory."""
    waiting: float
    """Requests that wait for memory, for a place in the batch, or for a step with room for their prompt."""
    arrivals: float = 1.0
    """Requests that came for each one that was admitted; above 1 the queue grows."""


@dataclass(frozen=True)
class Target:
    """When a replica is loaded just right.

    kv_in_use: part of its KV memory that live requests should hold; the rest is for growth, for cached prefixes, and
        for what comes while another replica starts.
    waiting: requests that may wait for each one that runs.  By Little's law it is the part of a request's time in the
        engine that it waits, whatever the rate and the model.
    slack: part of the load by which fewer replicas must have room to spare before some are stopped.
    """

    kv_in_use: float = 0.7
    waiting: float = 0.1
    slack: float = 0.2


def replicas_for(load: Load, target: Target) -> float:
    """How many replicas one replica's requests need, at most `GROWTH`.

    It is as full as its memory is; where requests wait it is full as well, whatever they wait for.  A queue's length
    says nothing of how many replicas are needed: what waits in an engine stays there, and while others start (minutes,
    on GPUs) it only grows.  The rate at which requests come, over that at which they are taken in, does.
    """
    waiting = load.waiting / max(load.resident, 1.0)
    full = max(load.kv_in_use, min(1.0, target.kv_in_use * waiting / target.waiting)) / target.kv_in_use
    return min(GROWTH, full * max(1.0, load.arrivals))


def arrivals(admitted: Sequence[float], waiting: Sequence[float]) -> float:
    """Requests that came for each one that was admitted, from a replica's reports in order of time."""
    if not admitted or not waiting:
        return 1.0
    taken = admitted[-1] - admitted[0]
    return max(0.0, taken + waiting[-1] - waiting[0]) / max(1.0, taken)


def wanted(loads: Sequence[Load], silent: int, present: int, target: Target) -> int:
    """How many replicas there should be, where `present` are running or on their way.

    `silent` ones run and have not reported: for growing they count as empty, for shrinking as full.  What holds all
    requests must run already, so nothing is stopped for the sake of replicas that are still to come.
    """
    if not loads:
        return present
    needed = sum(replicas_for(load, target) for load in loads)
    # 1e-9: sums of floats that should be whole.
    more = math.ceil(needed - 1e-9)
    fewer = max(1, math.ceil((needed + silent) / (1.0 - target.slack) - 1e-9))
    if more > present:
        return more
    return fewer if fewer < present and fewer <= len(loads) + silent else present


class KvMemoryPolicy:
    """Autoscaling policy of a Ray Serve deployment; its delays, bounds and averages are Ray's own."""

    def __init__(self, **target: float) -> None:
        """`target` are the fields of `Target`."""
        self._target = Target(**target)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted, before Ray's delays and bounds, and no state."""
        told: Mapping[str, Mapping[Hashable, float]] = context.aggregated_metrics or {}
        series: Mapping[str, Mapping[Hashable, Sequence[Any]]] = context.raw_metrics or {}

        def values(name: str, replica: Hashable) -> list[float]:
            return [point.value for point in series.get(name, {}).get(replica, ())]

        running = context.running_replicas
        names = (KV_IN_USE, RESIDENT, WAITING)
        loads = [
            Load(*(told[name][each] for name in names), arrivals(values(ADMITTED, each), values(WAITING, each)))
            for each in running
            if all(each in told.get(name, ()) for name in names)
        ]
        return wanted(loads, len(running) - len(loads), context.target_num_replicas, self._target), {}
