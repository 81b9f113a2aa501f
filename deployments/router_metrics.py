"""What a cache-aware router tells of itself, and what became of its predictions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from deployments.events import EventFeed
from deployments.metrics import Exporter
from jenga.metrics.definitions import REGISTRY
from jenga.metrics.export import Series

logger = logging.getLogger("ray.serve")

_PERIOD_S = 2.0


class RouterMetrics:
    """Decisions, fallbacks and the state of the index that `feed` keeps."""

    def __init__(self, feed: EventFeed, exporter: Exporter | None = None) -> None:
        self._feed = feed
        self._exporter = exporter or Exporter()
        self._exporter.begin("router")
        self._decision = self._series("jenga_router_decision_seconds")
        self._told: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Tell of the index from now on.  Called in an event loop, once or more often."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._tell_on())

    def fallback(self, reason: str) -> None:
        """A request was placed by load alone."""
        self._series("jenga_router_fallbacks_total", reason=reason).inc(1)

    def decided(self, seconds: float) -> None:
        """A request was placed by what is cached."""
        self._decision.observe(seconds)

    def tell(self) -> None:
        """Tell of the index and of its streams as they are now."""
        stats = self._feed.index.stats()
        self._series("jenga_router_index_blocks").set(stats.blocks)
        self._series("jenga_router_event_lag_seconds").set(self._feed.take_lag())
        self._series("jenga_router_replicas", stream="in_order").set(stats.trusted)
        # Not those that the index knows: it has never heard of a replica whose ports are closed.
        self._series("jenga_router_replicas", stream="uncertain").set(self._feed.followed - stats.trusted)
        totals = {
            "gap": stats.gaps,
            "restart": stats.restarts,
            "snapshot": stats.snapshots,
            "replay": self._feed.replays,
        }
        for kind, total in totals.items():
            if total > self._told.get(kind, 0):
                self._series("jenga_router_stream_repairs_total", kind=kind).inc(total - self._told.get(kind, 0))
                self._told[kind] = total

    async def _tell_on(self) -> None:
        """Also while no request comes: Ray drops a gauge that is not set again and again."""
        while True:
            try:
                self.tell()
            except Exception as error:  # metrics must not hurt serving
                logger.warning("the router's index is not told of: %s: %s", type(error).__name__, error)
            await asyncio.sleep(_PERIOD_S)

    def _series(self, name: str, **labels: str) -> Series:
        return self._exporter.series(REGISTRY[name], labels)


class Predictions:
    """How many cached tokens the router expected of this replica, against how many there were."""

    def __init__(self, exporter: Exporter, whose: Mapping[str, str]) -> None:
        self._exporter = exporter
        self._whose = whose
        self._exporter.begin("replica", whose)

    def record(self, predicted: int, actual: int) -> None:
        """One request's cached tokens."""
        outcome = "exact" if predicted == actual else "over" if predicted > actual else "under"
        sign = {"sign": "over" if predicted > actual else "under"}
        self._series("jenga_router_predictions_total", {"outcome": outcome}).inc(1)
        self._series("jenga_router_predicted_tokens_total", {}).inc(predicted)
        self._series("jenga_router_actual_tokens_total", {}).inc(actual)
        self._series("jenga_router_prediction_error_tokens", sign).observe(abs(predicted - actual))

    def _series(self, name: str, labels: Mapping[str, str]) -> Series:
        return self._exporter.series(REGISTRY[name], labels, self._whose)
