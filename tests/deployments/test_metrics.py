"""Defined metrics as Ray's, and what routers and replicas tell with them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve import metrics as ray_metrics

from deployments.events import EventFeed, Source
from deployments.metrics import Exporter
from deployments.ray_private import RayChangedError, private
from deployments.router_metrics import Predictions, RouterMetrics
from jenga.metrics import Observed, Sample
from jenga.metrics.definitions import METRICS, REGISTRY
from jenga.routing import BlockIndex

Key = tuple[str, tuple[tuple[str, str], ...]]


class FakeRay:
    """In the place of `ray.serve.metrics`: records what Ray would have been told, and refuses what Ray refuses."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.values: defaultdict[Key, float] = defaultdict(float)
        self.observed: defaultdict[Key, list[float]] = defaultdict(list)

    def __getattr__(self, kind: str) -> Any:
        ray = self

        class Metric:
            def __init__(
                self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: list[float] | None = None
            ) -> None:
                assert name not in ray.made, "made twice"
                assert (boundaries is not None) == (kind == "Histogram")
                ray.made[name] = (kind, tag_keys)
                self.name, self.tag_keys = name, tag_keys

            def key(self, tags: dict[str, str]) -> Key:
                assert set(tags) == set(self.tag_keys)
                return self.name, tuple(sorted(tags.items()))

            def set(self, value: float, tags: dict[str, str]) -> None:
                ray.values[self.key(tags)] = value

            def inc(self, value: float, tags: dict[str, str]) -> None:
                if value <= 0:
                    raise ValueError("a counter only goes up")
                ray.values[self.key(tags)] += value

            def _record(self, value: float, tags: dict[str, str]) -> None:
                ray.values[self.key(tags)] += value

            def observe(self, value: float, tags: dict[str, str]) -> None:
                ray.observed[self.key(tags)].append(value)

        return Metric


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


def test_every_metric_of_the_table_is_one_of_ray_s() -> None:
    """Ray takes every name, label and bucket of the table (it drops bad names with a warning only)."""
    out = Exporter(("model_name",))
    for metric in METRICS:
        labels = {label.name: (label.values or ("any",))[0] for label in metric.labels}
        series: Any = out.series(metric, labels, {"model_name": "m"})
        ray = series._metric
        assert (
            type(ray)
            is {
                "gauge": ray_metrics.Gauge,
                "counter": ray_metrics.Counter,
                "histogram": ray_metrics.Histogram,
            }[metric.kind]
        )
        assert not ray._discard_metric
        assert ray.info["tag_keys"] == (*metric.label_names, "model_name")


def test_samples_become_ray_s(ray: FakeRay) -> None:
    out = Exporter(("model_name",), ray)
    whose = {"model_name": "m"}
    pages, ages, size = (
        REGISTRY[n] for n in ("jenga_reused_pages_total", "jenga_eviction_age_seconds", "jenga_buffer_bytes")
    )
    nothing = (0,) * len(ages.buckets)
    for total in (0, 3, 3, 10, 4):  # the last is of an engine that began anew
        out.publish(
            [
                Sample(size, total, {}),
                Sample(pages, total, {"group": "a"}),
                Sample(ages, Observed((total, *nothing), (total / 20, *nothing)), {"group": "a"}),
            ],
            whose,
        )
    group = (("group", "a"), ("model_name", "m"))
    assert ray.values["jenga_buffer_bytes", (("model_name", "m"),)] == 4
    assert ray.values["jenga_reused_pages_total", group] == 14
    assert len(ray.observed["jenga_eviction_age_seconds", group]) == 14
    assert ray.made["jenga_reused_pages_total"] == ("Counter", ("group", "model_name"))


def test_counters_are_there_before_the_first_event(ray: FakeRay) -> None:
    Predictions(Exporter(("model_name",), ray), {"model_name": "m"})
    RouterMetrics(feed(), Exporter((), ray))
    expected = {m.name for m in METRICS if m.source in ("replica", "router") and m.kind == "counter"}
    assert {name for name, _ in ray.values} == expected
    assert set(ray.values.values()) == {0}


def feed(**totals: int) -> Any:
    stats = {"blocks": 7, "replicas": 3, "trusted": 2, "gaps": 0, "restarts": 0, "snapshots": 0, **totals}
    index = SimpleNamespace(stats=lambda: SimpleNamespace(**stats))
    return SimpleNamespace(index=index, followed=3, replays=4, take_lag=lambda: 0.25)


@pytest.mark.asyncio
async def test_a_replica_that_no_router_reaches_is_uncertain(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the alert of a stale event stream looks at, where ports between nodes are closed."""
    monkeypatch.setattr("deployments.events._REPLY_S", 0.01)
    monkeypatch.setattr("deployments.events._RETRY_S", 0.01)
    events = EventFeed(BlockIndex())
    forgotten: list[str] = []
    monkeypatch.setattr(events.index, "forget", forgotten.append)
    router = RouterMetrics(events, Exporter((), ray))
    at = f"ipc://{tmp_path}/nobody"
    events.follow({"r": Source(at, at, at, epoch=1, sequence=2)})
    while len(forgotten) < 2:  # tried again and again
        router.tell()
        told = {s: ray.values["jenga_router_replicas", (("stream", s),)] for s in ("in_order", "uncertain")}
        assert told == {"in_order": 0, "uncertain": 1}
        await asyncio.sleep(0.005)
    events.close()
    router.tell()
    assert ray.values["jenga_router_replicas", (("stream", "uncertain"),)] == 0


@pytest.mark.asyncio
async def test_a_router_tells_of_decisions_and_of_its_index(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.router_metrics._PERIOD_S", 0.001)
    events = feed(gaps=2, snapshots=3)
    router = RouterMetrics(events, Exporter((), ray))
    router.decided(0.003)
    router.fallback("no tokens")
    router.tell()
    assert ray.observed["jenga_router_decision_seconds", ()] == [0.003]
    assert ray.values["jenga_router_fallbacks_total", (("reason", "no tokens"),)] == 1
    assert ray.values["jenga_router_fallbacks_total", (("reason", "no index"),)] == 0
    assert ray.values["jenga_router_index_blocks", ()] == 7
    assert ray.values["jenga_router_event_lag_seconds", ()] == 0.25
    assert ray.values["jenga_router_replicas", (("stream", "uncertain"),)] == 1
    ray.values["jenga_router_index_blocks", ()] = 0  # as if Ray had dropped it, since no request came
    events.replays = 6
    router.start()
    router.start()
    while ray.values["jenga_router_index_blocks", ()] == 0:
        await asyncio.sleep(0.001)
    repairs = {k: ray.values["jenga_router_stream_repairs_total", (("kind", k),)] for k in ("gap", "replay", "restart")}
    assert repairs == {"gap": 2, "replay": 6, "restart": 0}


def test_predictions_are_compared(ray: FakeRay) -> None:
    predictions = Predictions(Exporter(("model_name",), ray), {"model_name": "m"})
    for predicted, actual in ((64, 64), (0, 0), (96, 32), (0, 16)):
        predictions.record(predicted, actual)
    model = ("model_name", "m")
    outcomes = {
        o: ray.values["jenga_router_predictions_total", (model, ("outcome", o))] for o in ("exact", "over", "under")
    }
    assert outcomes == {"exact": 2, "over": 1, "under": 1}
    assert ray.values["jenga_router_predicted_tokens_total", (model,)] == 160
    assert ray.values["jenga_router_actual_tokens_total", (model,)] == 112
    assert ray.observed["jenga_router_prediction_error_tokens", (model, ("sign", "over"))] == [64]
    assert ray.observed["jenga_router_prediction_error_tokens", (model, ("sign", "under"))] == [0, 0, 16]


def test_without_rays_private_names_it_is_said_once_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    class Counter:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def inc(self, amount: float, tags: dict[str, str]) -> None:
            told.append(amount)

    told: list[float] = []
    exporter = Exporter(ray=SimpleNamespace(Counter=Counter, Gauge=None, Histogram=None))
    metric = REGISTRY["jenga_router_fallbacks_total"]
    fallbacks = [exporter.series(metric, {"reason": reason}) for reason in ("no index", "adapter")]
    complaints = [record.getMessage() for record in caplog.records]
    assert len(complaints) == 1
    assert "Counter._record, which a counter that starts at 0 needs: install Ray 2.60" in complaints[0]
    fallbacks[0].inc(2)
    assert told == [2]
    with pytest.raises(RayChangedError, match=r"no builtins\.object\._fetch, which the memory map needs"):
        private(object(), "_fetch", "the memory map")
