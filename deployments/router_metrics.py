"""What a cache-aware router tells of itself, and what became of its predictions, through Ray Serve's metrics."""

from __future__ import annotations

import time

from ray.serve import metrics

from deployments.events import EventFeed

DECISION_MS = [0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64]
DIFFERENCE_TOKENS = [0, 16, 64, 256, 1024, 4096, 16384, 65536]
_PERIOD_S = 2.0


class RouterMetrics:
    """Decisions, fallbacks and the state of the index."""

    def __init__(self) -> None:
        self._decision = metrics.Histogram(
            "jenga_router_decision_ms", "Milliseconds to place one request, hashing included.", boundaries=DECISION_MS
        )
        self._fallbacks = metrics.Counter(
            "jenga_router_fallbacks", "Requests placed by load alone, by reason.", tag_keys=("reason",)
        )
        self._blocks = metrics.Gauge("jenga_router_index_blocks", "Distinct blocks that the index knows.")
        self._replicas = metrics.Gauge(
            "jenga_router_replicas", "Replicas by state of their event stream.", tag_keys=("stream",)
        )
        self._repairs = metrics.Counter(
            "jenga_router_stream_repairs", "What became of event streams, by kind.", tag_keys=("kind",)
        )
        self._told: dict[str, int] = {}
        self._next = 0.0

    def fallback(self, reason: str) -> None:
        """A request was placed by load alone."""
        self._fallbacks.inc(1, {"reason": reason})

    def decided(self, seconds: float, feed: EventFeed) -> None:
        """A request was placed by what is cached."""
        self._decision.observe(1000 * seconds)
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PERIOD_S
        stats = feed.index.stats()
        self._blocks.set(stats.blocks)
        self._replicas.set(stats.trusted, {"stream": "in_order"})
        self._replicas.set(stats.replicas - stats.trusted, {"stream": "uncertain"})
        totals = {"gap": stats.gaps, "restart": stats.restarts, "snapshot": stats.snapshots, "replay": feed.replays}
        for kind, total in totals.items():
            if total > self._told.get(kind, 0):
                self._repairs.inc(total - self._told.get(kind, 0), {"kind": kind})
                self._told[kind] = total


class Predictions:
    """How many cached tokens the router expected of this replica, against how many there were."""

    def __init__(self) -> None:
        self._outcomes = metrics.Counter(
            "jenga_router_predictions", "Requests by outcome of the router's prediction.", tag_keys=("outcome",)
        )
        self._difference = metrics.Histogram(
            "jenga_router_prediction_error_tokens",
            "Predicted minus actual cached tokens of a request, by sign.",
            boundaries=[0.5, *DIFFERENCE_TOKENS[1:]],
            tag_keys=("sign",),
        )

    def record(self, predicted: int, actual: int) -> None:
        """One request's cached tokens."""
        outcome = "exact" if predicted == actual else "over" if predicted > actual else "under"
        self._outcomes.inc(1, {"outcome": outcome})
        self._difference.observe(abs(predicted - actual), {"sign": "over" if predicted > actual else "under"})
