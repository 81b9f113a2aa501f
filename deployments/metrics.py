"""Metrics of `ray.serve.metrics`, which Ray's metrics agents export.

What they mean is `jenga.metrics`' business.  Ray Serve adds the labels ``replica``, ``deployment`` and ``application``,
and prefixes every name with ``ray_``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from deployments.ray_private import RayChangedError, private
from jenga.metrics import export
from jenga.metrics.definitions import Metric

logger = logging.getLogger("ray.serve")


@cache
def _complain_once(message: str) -> None:
    logger.error("%s; until then it is absent before its first event", message)


class Exporter(export.Exporter):
    """Exports through Ray; `labels` name those that every sample bears as well.

    `ray` is the module that makes metrics (default: `ray.serve.metrics`).
    """

    def __init__(self, labels: tuple[str, ...] = (), ray: Any = None) -> None:
        super().__init__(logger)
        if ray is None:
            from ray.serve import metrics as ray
        self._ray = ray
        self._labels = labels
        self._metrics: dict[str, Any] = {}

    def make(self, metric: Metric, labels: Mapping[str, str]) -> export.Series:
        """See `jenga.metrics.export.Exporter`."""
        made = self._metrics.get(metric.name)
        if made is None:
            options: dict[str, Any] = {
                "description": metric.meaning,
                "tag_keys": (*metric.label_names, *self._labels),
            }
            if metric.kind == "histogram":
                options["boundaries"] = list(metric.buckets)
            made = {"gauge": self._ray.Gauge, "counter": self._ray.Counter, "histogram": self._ray.Histogram}[
                metric.kind
            ](metric.name, **options)
            self._metrics[metric.name] = made
        return _Series(made, dict(labels))


class _Series:
    def __init__(self, metric: Any, tags: dict[str, str]) -> None:
        self._metric = metric
        self._tags = tags

    def set(self, value: float) -> None:
        self._metric.set(value, tags=self._tags)

    def inc(self, amount: float) -> None:
        if amount:
            self._metric.inc(amount, tags=self._tags)
        else:
            # Ray's counters refuse 0, but without it they would be absent until the first event.
            try:
                private(self._metric, "_record", "a counter that starts at 0")(0, tags=self._tags)
            except RayChangedError as error:  # metrics must not hurt serving
                _complain_once(str(error))

    def observe(self, value: float) -> None:
        self._metric.observe(value, tags=self._tags)
