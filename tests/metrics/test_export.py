"""Exporters: running totals become increments, and what is not in the table stays out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from jenga.metrics import Observed, Sample
from jenga.metrics.definitions import EVICTION_BUCKETS, MAX_VALUES, METRICS, REGISTRY, Metric
from jenga.metrics.export import UndefinedError
from jenga.metrics.prometheus import Exporter

PAGES = REGISTRY["jenga_reused_pages_total"]
BUFFER = REGISTRY["jenga_buffer_bytes"]
AGES = REGISTRY["jenga_eviction_age_seconds"]
FALLBACKS = REGISTRY["jenga_router_fallbacks_total"]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_gauges_follow_and_totals_go_up(registry: CollectorRegistry) -> None:
    out = Exporter(("engine",), registry)

    def publish(size: int, total: int, engine: str) -> None:
        out.publish([Sample(BUFFER, size, {}), Sample(PAGES, total, {"group": "g"})], {"engine": engine})

    publish(5, 10, "0")
    publish(7, 0, "1")
    publish(2, 14, "0")
    value = registry.get_sample_value
    assert value("jenga_buffer_bytes", {"engine": "0"}) == 2
    assert value("jenga_reused_pages_total", {"engine": "0", "group": "g"}) == 14
    assert value("jenga_reused_pages_total", {"engine": "1", "group": "g"}) == 0, "a counter begins at 0"
    publish(2, 6, "0")  # the engine began anew
    assert value("jenga_reused_pages_total", {"engine": "0", "group": "g"}) == 20


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1e4), max_size=12), max_size=6))
def test_histograms_keep_buckets_and_sums(batches: list[list[float]]) -> None:
    """What arrives as running totals, batch by batch, is what was observed."""
    registry = CollectorRegistry()
    out = Exporter((), registry)
    ends = (*EVICTION_BUCKETS, math.inf)
    counts, sums, seen = [0] * len(ends), [0.0] * len(ends), list[float]()
    for batch in batches:
        for one in batch:
            bucket = next(i for i, end in enumerate(ends) if one <= end)
            counts[bucket] += 1
            sums[bucket] += one
        seen += batch
        out.publish([Sample(AGES, Observed(tuple(counts), tuple(sums)), {"group": "g"})])
        for end in ends:
            le = "+Inf" if end == math.inf else str(end)
            exported = registry.get_sample_value("jenga_eviction_age_seconds_bucket", {"group": "g", "le": le})
            assert exported == sum(one <= end for one in seen)
        total = registry.get_sample_value("jenga_eviction_age_seconds_sum", {"group": "g"})
        assert total == pytest.approx(sum(seen))


def test_an_engine_that_restarts_adds_to_its_histogram(registry: CollectorRegistry) -> None:
    out = Exporter((), registry)
    buckets = len(EVICTION_BUCKETS) + 1
    for first, total in ((5, 0.1), (2, 0.04), (3, 0.05)):
        out.publish(
            [Sample(AGES, Observed((first, *[0] * (buckets - 1)), (total, *[0.0] * (buckets - 1))), {"group": "g"})]
        )
    assert registry.get_sample_value("jenga_eviction_age_seconds_count", {"group": "g"}) == 8
    assert registry.get_sample_value("jenga_eviction_age_seconds_sum", {"group": "g"}) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("metric", "labels", "words"),
    [
        (Metric("jenga_new_pages", "gauge", "pages", "x", "x"), {}, "not in the table"),
        (PAGES, {}, "has the labels"),
        (PAGES, {"group": "a", "request": "1"}, "has the labels"),
        (FALLBACKS, {"reason": "bad luck"}, "none of no tokens, no index, index failed, adapter"),
    ],
)
def test_what_is_not_defined_is_refused(
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
    metric: Metric,
    labels: dict[str, str],
    words: str,
) -> None:
    out = Exporter((), registry)
    with pytest.raises(UndefinedError, match=words):
        out.series(metric, labels)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out.publish([Sample(metric, 1, labels), Sample(BUFFER, 3, {})])
    assert registry.get_sample_value("jenga_buffer_bytes") == 3
    assert [words in record.getMessage() for record in caplog.records] == [True], "told once, and never raised"
    assert {m.name for m in registry.collect()} == {"jenga_buffer_bytes"}


def test_values_that_depend_on_the_model_are_bounded(registry: CollectorRegistry) -> None:
    out = Exporter(("engine",), registry)
    for engine in ("0", "1"):  # for each engine
        for round_ in (1, 2):
            out.publish([Sample(PAGES, round_, {"group": f"g{n}"}) for n in range(MAX_VALUES + 5)], {"engine": engine})
    (family,) = registry.collect()
    totals = [s for s in family.samples if s.name == PAGES.name]
    assert len(totals) == 2 * MAX_VALUES
    assert {s.value for s in totals} == {2}, "those that are known go on"


def test_a_source_that_fails_is_told_of_once(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Iterator[Sample]:
        yield Sample(BUFFER, 1, {})
        raise RuntimeError("no snapshot")

    out = Exporter((), registry)
    out.publish(broken())
    out.publish(broken())
    assert registry.get_sample_value("jenga_buffer_bytes") == 1
    assert [record.getMessage().count("no snapshot") for record in caplog.records] == [1]


def test_kinds_are_not_mixed_up(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    out = Exporter((), registry)
    out.publish([Sample(AGES, 1, {"group": "g"}), Sample(BUFFER, Observed((1,), (1.0,)), {})])
    assert len(caplog.records) == 2


@pytest.mark.parametrize("source", ["replica", "router"])
def test_counters_exist_before_anything_happened(registry: CollectorRegistry, source: str) -> None:
    Exporter((), registry).begin(source)  # type: ignore[arg-type]
    counters = [m for m in METRICS if m.source == source and m.kind == "counter"]
    found = [s for family in registry.collect() for s in family.samples if s.name.endswith("_total")]
    assert len(counters) > 1
    assert len(found) == sum(math.prod(len(label.values) for label in m.labels) for m in counters)
    assert {s.value for s in found} == {0}
