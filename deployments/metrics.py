"""Export of engine metrics through Ray: samples in, gauges and counters of `ray.serve.metrics` out.

What the samples mean is `jenga.metrics`' business.  Ray Serve adds the labels ``replica``,
``deployment`` and ``application``, and prefixes every name with ``ray_``.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

logger = logging.getLogger("ray.serve")

# More label sets than this, over all metrics of a replica, are a fault of the source: the rest is dropped.
MAX_SERIES = 2_000


class Sample(Protocol):
    """One value of one metric; a counter's value is its running total."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["gauge", "counter"]: ...
    @property
    def help(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def value(self) -> float: ...


class Exporter:
    """Keeps one Ray metric per sample name.

    A fault is logged once per metric and never raised: metrics must not hurt serving.
    """

    def __init__(
        self,
        make_gauge: Callable[..., Any] | None = None,
        make_counter: Callable[..., Any] | None = None,
        max_series: int = MAX_SERIES,
    ) -> None:
        if make_gauge is None or make_counter is None:
            from ray.serve import metrics

            make_gauge, make_counter = make_gauge or metrics.Gauge, make_counter or metrics.Counter
        self._make = {"gauge": make_gauge, "counter": make_counter}
        self._metrics: dict[str, Any] = {}
        self._totals: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._max_series = max_series
        self._complained: set[str] = set()

    def publish(self, samples: Iterable[Sample]) -> None:
        """Hand the samples to Ray."""
        try:
            for sample in samples:
                try:
                    self._publish_one(sample)
                except Exception as error:
                    self._complain(sample.name, error)
        except Exception as error:
            self._complain("the source of metrics", error)

    def _publish_one(self, sample: Sample) -> None:
        labels = dict(sample.labels)
        series = (sample.name, frozenset(labels.items()))
        if series not in self._totals and len(self._totals) >= self._max_series:
            raise OverflowError(f"more than {self._max_series} label sets")
        before = self._totals.get(series, 0.0)
        metric = self._metrics.get(sample.name)
        if metric is None:
            metric = self._make[sample.kind](sample.name, description=sample.help, tag_keys=tuple(sorted(labels)))
            self._metrics[sample.name] = metric
        if sample.kind == "gauge":
            metric.set(sample.value, tags=labels)
        else:
            # A total below the last one means that its engine began anew, from zero.
            increment = sample.value - before if sample.value >= before else sample.value
            if increment > 0:
                metric.inc(increment, tags=labels)
        self._totals[series] = sample.value

    def _complain(self, what: str, error: Exception) -> None:
        if what not in self._complained:
            self._complained.add(what)
            logger.warning("metric %s is not exported: %s: %s", what, type(error).__name__, error)
