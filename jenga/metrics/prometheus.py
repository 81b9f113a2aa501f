"""Metrics of `prometheus_client`, for processes that Prometheus scrapes themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from jenga.metrics import export
from jenga.metrics.definitions import Metric


class Exporter(export.Exporter):
    """Exports into a registry; `labels` name those that every sample bears as well."""

    def __init__(self, labels: Iterable[str] = (), registry: CollectorRegistry = REGISTRY) -> None:
        super().__init__()
        self._labels = tuple(labels)
        self._registry = registry
        self._metrics: dict[str, Gauge | Counter | Histogram] = {}

    def make(self, metric: Metric, labels: Mapping[str, str]) -> export.Series:
        """See `jenga.metrics.export.Exporter`."""
        made = self._metrics.get(metric.name)
        if made is None:
            made = self._metrics[metric.name] = self._define(metric)
        series: export.Series = made.labels(**labels) if labels else made  # type: ignore[assignment]
        return series

    def _define(self, metric: Metric) -> Gauge | Counter | Histogram:
        names = (*metric.label_names, *self._labels)
        if metric.kind == "gauge":
            # Where several processes answer scrapes, only one of them asks the engine.
            return Gauge(metric.name, metric.meaning, names, registry=self._registry, multiprocess_mode="mostrecent")
        if metric.kind == "counter":
            return Counter(metric.name, metric.meaning, names, registry=self._registry)
        return Histogram(metric.name, metric.meaning, names, registry=self._registry, buckets=metric.buckets)
