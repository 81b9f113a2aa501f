"""Samples as metrics of `prometheus_client`, for processes that Prometheus scrapes themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from jenga.metrics.samples import Sample


class Exporter:
    """Keeps one metric per sample name; all samples bear the labels named at construction as well."""

    def __init__(self, labels: Iterable[str] = (), registry: CollectorRegistry = REGISTRY) -> None:
        self._labels = tuple(labels)
        self._registry = registry
        self._metrics: dict[str, Gauge | Counter] = {}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}

    def publish(self, samples: Iterable[Sample], labels: Mapping[str, str]) -> None:
        """Set gauges, and raise counters to the totals of the samples; `labels` are those named at construction.

        A total below the last one means that its engine began anew, from zero.
        """
        for sample in samples:
            given = {**sample.labels, **labels}
            metric = self._metrics.get(sample.name) or self._make(sample)
            series = metric.labels(**given)
            if isinstance(series, Gauge):
                series.set(sample.value)
                continue
            key = (sample.name, tuple(given[name] for name in sorted(given)))
            before = self._totals.get(key, 0.0)
            series.inc(sample.value - before if sample.value >= before else sample.value)
            self._totals[key] = sample.value

    def _make(self, sample: Sample) -> Gauge | Counter:
        names = (*sample.labels, *self._labels)
        metric: Gauge | Counter
        if sample.kind == "gauge":
            # Where several processes answer scrapes, only one of them asks the engine.
            metric = Gauge(sample.name, sample.help, names, registry=self._registry, multiprocess_mode="mostrecent")
        else:
            metric = Counter(sample.name, sample.help, names, registry=self._registry)
        self._metrics[sample.name] = metric
        return metric
