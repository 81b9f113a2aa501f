"""What can be wrong with a dashboard: its queries' grammar, names that nothing exports, panels that stay empty."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import promql_parser
import yaml

from dashboards.cluster import GPU_ONLY
from dashboards.source import RAY, VLLM, Source
from jenga.metrics.definitions import REGISTRY

PARTS = ("bucket", "sum", "count")
# Points of a range query; enough to find what was there for a scrape or two.
_POINTS = 120
_TIMEOUT_S = 30.0


class CheckError(Exception):
    """A check that could not be done; the message is for the user."""


@dataclass(frozen=True)
class Query:
    """One query of one panel."""

    dashboard: str
    panel: str
    expr: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.dashboard} / {self.panel}"


def read(texts: Mapping[str, str]) -> list[Query]:
    """All queries of dashboards (JSON by name).

    Raises:
        CheckError: a text that is no dashboard.
    """
    found: list[Query] = []
    for name, text in texts.items():
        try:
            data = json.loads(text)
            found += _queries(data["title"], data["panels"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckError(f"{name} is not a dashboard ({type(error).__name__}: {error})") from None
    return found


def _queries(dashboard: str, panels: Iterable[dict[str, Any]]) -> Iterator[Query]:
    for panel in panels:
        for target in panel.get("targets", ()):
            yield Query(dashboard, panel["title"], target["expr"])
        yield from _queries(dashboard, panel.get("panels", ()))


def interpolate(expr: str, window: str = "1m") -> str:
    """The query as Grafana sends it with all variables at "All"; `window` takes the place of Grafana's intervals."""
    expr = re.sub(r"\$\{?__(rate_interval|interval|range)\}?", window, expr)
    return re.sub(r"\$(\w+|\{\w+(:\w+)?\})", ".*", expr)


def grammar_faults(queries: Iterable[Query]) -> list[str]:
    """Queries that are not PromQL, and metrics that nothing exports."""
    known = _exported()
    faults = []
    for query in queries:
        try:
            names = metric_names(interpolate(query.expr))
        except ValueError as error:
            faults.append(f"{query.place}: {error}: {query.expr}")
            continue
        faults += [f"{query.place}: nothing exports {name}" for name in sorted(names - known)]
    return faults


def metric_names(expr: str) -> set[str]:
    """The metrics that an expression reads.

    Raises:
        ValueError: it is not PromQL.
    """
    names: set[str] = set()
    _collect(promql_parser.parse(expr), names)
    return names


def _collect(node: Any, names: set[str]) -> None:
    match node:
        case promql_parser.VectorSelector():
            names.add(node.name or "")
        case promql_parser.MatrixSelector():
            names.add(node.vector_selector.name or "")
        case promql_parser.BinaryExpr():
            _collect(node.lhs, names)
            _collect(node.rhs, names)
        case promql_parser.Call():
            for argument in node.args:
                _collect(argument, names)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            _collect(node.expr, names)
        case promql_parser.SubqueryExpr():
            _collect(node.expr, names)


def _exported() -> set[str]:
    """Every name that Prometheus may see from us, vLLM and Ray."""
    names = {"ALERTS"}
    for s in (Source(True, False), Source(False, False)):
        ours = {name: metric.kind for name, metric in REGISTRY.items()}
        for select, kinds in ((s.ours, ours), (s.vllm, VLLM), (s.of_ray, RAY)):
            for name, kind in kinds.items():
                names |= {select(name, part=part) for part in (PARTS if kind == "histogram" else ("",))}
    return names


def promtool() -> str | None:
    """Path of Prometheus' own checker, None if it is not installed."""
    return shutil.which("promtool")


def promtool_faults(queries: Iterable[Query], program: str) -> str:
    """What promtool says against the queries, written as recording rules; empty if nothing."""
    named = {f"panel:query:{number}": query for number, query in enumerate(queries)}
    rules = [{"record": name, "expr": interpolate(query.expr)} for name, query in named.items()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rules.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        done = subprocess.run([program, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    said = done.stdout + done.stderr
    for name, query in named.items():
        said = re.sub(rf'"{name}"', f'"{query.place}"', said)
    return said.strip()


@dataclass(frozen=True)
class Coverage:
    """Which panels had data."""

    with_data: tuple[str, ...]
    empty: tuple[str, ...]
    """Place and first such query of those that had none."""
    empty_without_gpu: tuple[str, ...]
    """Those that only a GPU can fill."""


def coverage(queries: Iterable[Query], prometheus: str, minutes: float) -> Coverage:
    """Run every query over the last `minutes`; a panel has data if each of its queries has a number.

    Raises:
        CheckError: Prometheus does not answer, or refuses a query.
    """
    places: dict[str, list[str]] = {}
    gpu = set()
    with _client(prometheus) as client:
        for query in queries:
            missing = places.setdefault(query.place, [])
            if not _has_numbers(client, query, minutes):
                missing.append(query.expr)
            if query.panel in GPU_ONLY:
                gpu.add(query.place)
    empty = {place: missing for place, missing in places.items() if missing}
    return Coverage(
        tuple(place for place in places if place not in empty),
        tuple(f"{place}: {missing[0]}" for place, missing in empty.items() if place not in gpu),
        tuple(place for place in empty if place in gpu),
    )


def _client(prometheus: str) -> httpx.Client:
    parts = urlsplit(prometheus)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CheckError(f"--prometheus {prometheus}: not a URL such as http://127.0.0.1:9090")
    try:
        local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        local = False
    # A proxy is never the way to this machine.
    return httpx.Client(base_url=prometheus, timeout=_TIMEOUT_S, trust_env=not local)


def _has_numbers(client: httpx.Client, query: Query, minutes: float) -> bool:
    end = time.time()
    step = max(1.0, 60 * minutes / _POINTS)
    asked: dict[str, str | float] = {
        "query": interpolate(query.expr),
        "start": end - 60 * minutes,
        "end": end,
        "step": step,
    }
    try:
        response = client.get("/api/v1/query_range", params=asked)
        answer = response.json()
        if answer["status"] != "success":
            raise CheckError(f"Prometheus refuses a query of {query.place}: {answer.get('error')}")
        series = answer["data"]["result"]
        return any(not math.isnan(float(value)) for one in series for _, value in one["values"])
    except httpx.HTTPError as error:
        raise CheckError(f"no answer from Prometheus at {client.base_url}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckError(f"{client.base_url} does not answer like Prometheus (HTTP {response.status_code})") from None
