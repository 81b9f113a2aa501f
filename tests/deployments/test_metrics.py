"""Samples onto Ray's metrics."""

from collections import defaultdict
from typing import Any

import pytest

from deployments.metrics import Exporter
from jenga.metrics import Sample


class FakeRay:
    """Records what Ray would have been told."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, tuple[str, ...]]] = []
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)

    def metric(self, kind: str) -> Any:
        ray = self

        class Metric:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                if name == "refused":
                    raise ValueError("Ray does not like this name")
                ray.made.append((kind, name, tag_keys))
                self.name = name

            def set(self, value: float, tags: dict[str, str]) -> None:
                ray.values[self.name, tuple(sorted(tags.items()))] = value

            def inc(self, value: float, tags: dict[str, str]) -> None:
                if value <= 0:
                    raise ValueError("a counter only goes up")
                ray.values[self.name, tuple(sorted(tags.items()))] += value

        return Metric


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


def exporter(ray: FakeRay, **options: Any) -> Exporter:
    return Exporter(ray.metric("gauge"), ray.metric("counter"), **options)


def gauge(value: float, name: str = "bytes", **labels: str) -> Sample:
    return Sample(name, "gauge", "help", labels, value)


def counter(value: float, name: str = "hits", **labels: str) -> Sample:
    return Sample(name, "counter", "help", labels, value)


def test_a_gauge_takes_the_last_value_of_each_label_set(ray: FakeRay) -> None:
    out = exporter(ray)
    out.publish([gauge(1, state="free", group="a"), gauge(2, state="used", group="a")])
    out.publish([gauge(5, state="free", group="a")])
    assert ray.made == [("gauge", "bytes", ("group", "state"))]
    assert ray.values["bytes", (("group", "a"), ("state", "free"))] == 5
    assert ray.values["bytes", (("group", "a"), ("state", "used"))] == 2


def test_running_totals_become_increments(ray: FakeRay) -> None:
    out = exporter(ray)
    for total in (3, 3, 10):
        out.publish([counter(total, group="a"), counter(1, group="b")])
    assert ray.values["hits", (("group", "a"),)] == 10
    assert ray.values["hits", (("group", "b"),)] == 1


def test_a_total_that_falls_began_anew(ray: FakeRay) -> None:
    out = exporter(ray)
    for total in (10, 4, 6):
        out.publish([counter(total)])
    assert ray.values["hits", ()] == 16


def test_label_sets_are_bounded_and_known_ones_go_on(ray: FakeRay) -> None:
    out = exporter(ray, max_series=3)
    for round_ in range(2):
        out.publish([gauge(round_, request=str(i)) for i in range(10)])
    assert len(ray.values) == 3
    assert set(ray.values.values()) == {1}


def test_faults_stay_inside(ray: FakeRay, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Any:
        yield gauge(1, name="before")
        raise RuntimeError("no snapshot")

    out = exporter(ray)
    out.publish([gauge(1, name="refused"), gauge(2, name="good")])
    out.publish([gauge(1, name="refused")])
    out.publish(broken())
    assert ray.values["good", ()] == 2
    assert ray.values["before", ()] == 1
    assert sum("refused" in record.message for record in caplog.records) == 1
    assert any("no snapshot" in record.message for record in caplog.records)
