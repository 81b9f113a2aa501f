"""What every exporter does with samples, whatever it exports to."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from math import nextafter
from typing import Protocol

from jenga.metrics.definitions import METRICS, REGISTRY, Metric, Source
from jenga.metrics.samples import Observed, Sample

logger = logging.getLogger(__name__)


class Series(Protocol):
    """One time series; which method is called depends on its metric's kind."""

    def set(self, value: float) -> None: ...
    def inc(self, amount: float) -> None:
        """By `amount`, which may be 0: then the series only comes into being."""

    def observe(self, value: float) -> None: ...


class UndefinedError(ValueError):
    """A sample is not what the table says; the message names metric and label."""


class Exporter(ABC):
    """Keeps one series per label set of each defined metric; running totals become increments.

    A fault is logged once per metric and not raised: metrics must not hurt serving.
    """

    def __init__(self, log: logging.Logger = logger) -> None:
        self._log = log
        self._series: dict[tuple[str, ...], Series] = {}
        self._totals: dict[tuple[str, ...], float | Observed] = {}
        self._values: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
        self._complained: set[str] = set()

    @abstractmethod
    def make(self, metric: Metric, labels: Mapping[str, str]) -> Series:
        """A new series; `labels` are the metric's and those given to `publish`."""

    def publish(self, samples: Iterable[Sample], labels: Mapping[str, str] | None = None) -> None:
        """Export the samples; `labels` say whose they are, the same names each time.

        A total below the last one means that its source began anew, from zero.
        """
        try:
            for sample in samples:
                try:
                    self._publish(sample, labels or {})
                except Exception as error:
                    self._complain(sample.metric.name, error)
        except Exception as error:
            self._complain("the source of metrics", error)

    def series(self, metric: Metric, labels: Mapping[str, str], whose: Mapping[str, str] | None = None) -> Series:
        """The series of a metric with these labels, counters beginning at 0.

        Raises:
            UndefinedError: the table does not have it, or not with such labels.
        """
        whose = whose or {}
        key = (metric.name, *labels.values(), *whose.values())
        found = self._series.get(key)
        if found is None:
            self._check(metric, labels, whose)
            found = self._series[key] = self.make(metric, {**labels, **whose})
            if metric.kind == "counter":
                found.inc(0)
        return found

    def begin(self, source: Source, whose: Mapping[str, str] | None = None) -> None:
        """Begin every counter of `source` at 0, for all values that its labels can have."""
        for metric in METRICS:
            if metric.source == source and metric.kind == "counter":
                for values in product(*(label.values for label in metric.labels)):
                    self.series(metric, dict(zip(metric.label_names, values, strict=True)), whose)

    def _publish(self, sample: Sample, whose: Mapping[str, str]) -> None:
        metric, now = sample.metric, sample.value
        series = self.series(metric, sample.labels, whose)
        key = (metric.name, *sample.labels.values(), *whose.values())
        if isinstance(now, Observed):
            if metric.kind != "histogram":
                raise UndefinedError(f"{metric.name} is a {metric.kind}, and was given a histogram's totals")
            for value in _new_values(metric, now, self._totals.get(key)):
                series.observe(value)
            self._totals[key] = now
        elif metric.kind == "gauge":
            series.set(now)
        elif metric.kind == "counter":
            before = self._totals.get(key, 0.0)
            assert isinstance(before, int | float)
            increment = now - before if now >= before else now
            if increment:
                series.inc(increment)
            self._totals[key] = now
        else:
            raise UndefinedError(f"{metric.name} is a histogram, and was given a number")

    def _check(self, metric: Metric, labels: Mapping[str, str], whose: Mapping[str, str]) -> None:
        if REGISTRY.get(metric.name) is not metric:
            raise UndefinedError(f"{metric.name} is not in the table of metrics")
        if tuple(labels) != metric.label_names:
            raise UndefinedError(f"{metric.name} has the labels {metric.label_names}, not {tuple(labels)}")
        for label in metric.labels:
            value = labels[label.name]
            if label.values and value not in label.values:
                raise UndefinedError(f"{metric.name}: {label.name}={value!r} is none of {', '.join(label.values)}")
            if not label.values:
                known = self._values[metric.name, label.name, *whose.values()]
                if value not in known and len(known) >= label.limit:
                    raise UndefinedError(f"{metric.name}: more than {label.limit} values of {label.name}")
                known.add(value)

    def _complain(self, what: str, error: Exception) -> None:
        if what not in self._complained:
            self._complained.add(what)
            self._log.warning("metric %s is not exported: %s: %s", what, type(error).__name__, error)


def _new_values(metric: Metric, now: Observed, before: float | Observed | None) -> Iterator[float]:
    """As many values as came in since `before`, each in its bucket, with the right sum in each bucket."""
    if not isinstance(before, Observed) or any(a < b for a, b in zip(now.counts, before.counts, strict=True)):
        before = Observed((0,) * len(now.counts), (0.0,) * len(now.sums))
    ends = (*metric.buckets, float("inf"))
    for i, (end, count, total) in enumerate(zip(ends, now.counts, now.sums, strict=True)):
        new = count - before.counts[i]
        if new:
            # Differences of sums are rounded, which must not put a value into the next bucket.
            start = nextafter(ends[i - 1], end) if i else 0.0
            mean = min(max((total - before.sums[i]) / new, start), end)
            for _ in range(new):
                yield mean
