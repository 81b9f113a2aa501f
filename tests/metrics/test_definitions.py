"""The table of metrics: conventions hold, the page is the table, and nothing is made beside it."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client.metrics import MetricWrapperBase
from typer.testing import CliRunner
from vllm.v1.metrics import loggers

from jenga.metrics.cli import add_commands
from jenga.metrics.definitions import METRICS, REGISTRY, VLLM_METRICS, DefinitionError, Label, Metric
from jenga.metrics.page import markdown

ROOT = Path(__file__).resolve().parents[2]
GOOD = Metric("jenga_things_total", "counter", "things", "Things", "everything")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "things_total"}, "no metric name"),
        ({"name": "jenga_Things_total"}, "no metric name"),
        ({"name": "jenga_things"}, "end in _total"),
        ({"kind": "gauge"}, "end in _total"),
        ({"unit": ""}, "not a base unit"),
        ({"unit": "pages"}, "not a base unit"),
        ({"name": "jenga_things_ms_total", "unit": "ms"}, "not a base unit"),
        ({"name": "jenga_things_percent_total", "unit": "percent"}, "not a base unit"),
        ({"meaning": ""}, "say what"),
        ({"sums": ""}, "say what"),
        ({"labels": (Label("a", "x", ("b",)), Label("a", "x", ("c",)))}, "twice"),
        ({"buckets": (1.0,)}, "only they, have buckets"),
        ({"name": "jenga_things", "kind": "histogram"}, "only they, have buckets"),
        ({"name": "jenga_things", "kind": "histogram", "buckets": (1.0, 1.0)}, "must ascend"),
        ({"name": "jenga_things", "kind": "histogram", "buckets": (0.0, 1.0)}, "from above 0"),
    ],
)
def test_a_metric_that_breaks_a_convention_cannot_be_defined(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ({"name": "Group", "values": ("a",)}, "lower case"),
        ({"name": "request"}, "name its values, or a limit"),
        ({"name": "request", "limit": 1000}, "at most 64"),
    ],
)
def test_a_label_must_be_bounded(label: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        Label(meaning="x", **label)


def test_names_are_unique_and_series_are_few() -> None:
    assert len(REGISTRY) == len(METRICS)
    families = [m.name.removesuffix("_total") for m in METRICS]
    assert len(set(families)) == len(families), "a counter and a gauge would be one family to a Prometheus client"
    # A replica of a model with eight layer groups.
    series = 0
    for metric in METRICS:
        many = len(metric.buckets) + 3 if metric.kind == "histogram" else 1
        for label in metric.labels:
            many *= len(label.values) or 8
        series += many
    assert series < 500


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == markdown(), "run: jenga metrics --markdown > docs/metrics.md"
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.kind} | {metric.unit} |" in markdown()


def test_the_command_lists_all() -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    add_commands(app)
    table, page = (CliRunner().invoke(app, ["metrics", *options]) for options in ([], ["--markdown"]))
    assert (table.exit_code, page.exit_code) == (0, 0)
    assert page.stdout == markdown()
    assert all(metric.name in table.stdout for metric in (*METRICS, *VLLM_METRICS))


def test_what_other_pages_name_is_in_the_table() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    ends = "(_bucket|_count|_sum)?"
    for page in pages:
        for name in re.findall(r"ray_(jenga_[a-z0-9_]+)", page.read_text()):
            assert any(re.fullmatch(m + ends, name) for m in REGISTRY), f"{page.name}: {name}"


def test_nothing_is_exported_beside_the_table() -> None:
    """Prometheus' and Ray's metric classes are called by the exporters alone."""
    makers = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
    found = set()
    for folder in ("jenga", "deployments"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "prometheus_client":
                    found.add(str(file.relative_to(ROOT)))
                if (
                    isinstance(node, ast.Attribute)
                    and node.attr in makers
                    and getattr(node.value, "id", "") != "collections"
                ):
                    found.add(str(file.relative_to(ROOT)))
    assert found == {"jenga/metrics/prometheus.py", "deployments/metrics.py"}


def test_vllm_has_the_metrics_that_are_left_to_it() -> None:
    calls = {}
    for node in ast.walk(ast.parse(Path(loggers.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = [k.value.value for k in node.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)]
            calls.update(dict.fromkeys(names, node.func.attr))
    kinds = {"_gauge_cls": "gauge", "_counter_cls": "counter", "_histogram_cls": "histogram"}
    assert issubclass(loggers.PrometheusStatLogger._gauge_cls, MetricWrapperBase)
    for metric in VLLM_METRICS:
        assert kinds[calls[metric.name]] == metric.kind, metric.name
