"""Recording rules and alerts for Prometheus; cluster/prometheus has them as files.

Limits of alerts stand here only; the annotation `runbook` names a section of docs/dashboards.md that says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dashboards import expressions as e
from dashboards.source import Source

RUNBOOK = "docs/dashboards.md"
WINDOW = "5m"
INTERVAL = "10s"


@dataclass(frozen=True)
class Record:
    """A recording rule: `level:metric:operation`, as Prometheus advises."""

    name: str
    expr: str


@dataclass(frozen=True)
class Alert:
    """An alert and its runbook line; `anchor` is a heading of RUNBOOK."""

    name: str
    expr: str
    lasting: str
    summary: str
    anchor: str
    first_step: str
    severity: str = "warning"


def records(s: Source) -> list[Record]:
    """Ratios that alerts read and that users may."""
    s = s.unfiltered
    found = [
        Record("engine:jenga_memory_waste:ratio", e.waste_ratio(s, s.engine)),
        Record("engine:jenga_stock_waste:ratio", e.stock_waste_ratio(s, s.engine)),
        Record("engine:jenga_hit:ratio5m", e.hit_ratio(s, s.engine, WINDOW)),
        Record("service:jenga_hit:ratio5m", e.hit_ratio(s, s.service, WINDOW)),
        Record("service:jenga_preempted:ratio5m", e.preempted_ratio(s, s.service, WINDOW)),
    ]
    if s.ray:
        found += [
            Record("service:jenga_predictions_exact:ratio5m", e.exact_ratio(s, s.service, WINDOW)),
            Record("service:jenga_wanted_replicas:count", e.wanted_replicas(s, s.service)),
            Record("service:jenga_healthy_replicas:count", e.healthy_replicas(s, s.service)),
        ]
    return found


def alerts(s: Source) -> list[Alert]:
    """What somebody should look at."""
    s = s.unfiltered
    who = "replica {{ $labels.replica }}" if s.ray else "{{ $labels.instance }}"
    model = "{{ $labels.application }}, {{ $labels.deployment }}" if s.ray else "{{ $labels.model_name }}"
    before = "avg_over_time(service:jenga_hit:ratio5m[1h] offset 10m)"
    found = [
        Alert(
            "JengaMemoryWasteHigh",
            "engine:jenga_memory_waste:ratio > 0.25",
            "10m",
            f"{who} loses {{{{ $value | humanizePercentage }}}} of its KV memory",
            "memory-waste-high",
            "see which cause and group it is on the dashboard Memory, then `jenga plan` for the model",
        ),
        Alert(
            "JengaHitRateCollapsed",
            f"service:jenga_hit:ratio5m < 0.5 * {before} and {before} > 0.2",
            "5m",
            f"{model}: prefix hits fell to {{{{ $value | humanizePercentage }}}}, less than half of the last hour's",
            "hit-rate-collapsed",
            "look for prompts that changed, evictions and new replicas",
        ),
        Alert(
            "JengaPreemptionStorm",
            "service:jenga_preempted:ratio5m > 0.1",
            "5m",
            f"{model}: {{{{ $value | humanizePercentage }}}} of the admissions are requests that were preempted",
            "preemption-storm",
            "lower engine.max_num_seqs, or raise kv_memory or the number of replicas",
        ),
    ]
    if not s.ray:
        return found
    uncertain = s.ours("jenga_router_replicas", 'stream="uncertain"')
    lag = s.ours("jenga_router_event_lag_seconds")
    wanted, healthy = "service:jenga_wanted_replicas:count", "service:jenga_healthy_replicas:count"
    return [
        *found,
        Alert(
            "JengaPredictionsDiverge",
            "service:jenga_predictions_exact:ratio5m < 0.8 and "
            f"{e.rate(s.ours('jenga_router_predictions_total'), s.service, WINDOW)} > 0.1",
            "10m",
            f"{model}: only {{{{ $value | humanizePercentage }}}} of the router's predictions came true",
            "predictions-diverge",
            "look at event streams, their lag and the requests at a time on the dashboard Prefix cache and routing",
        ),
        Alert(
            "JengaEventStreamStale",
            f"max by (application) ({uncertain}) > 0 or max by (application) ({lag}) > 5",
            "2m",
            "{{ $labels.application }}: a router does not know what some replica has cached",
            "event-stream-stale",
            "see whether the ports of KV events are open between the nodes",
        ),
        Alert(
            # Fewer than were wanted for all of the last minutes: a replica that was asked for just now may still start.
            "JengaReplicaDown",
            f"min_over_time({wanted}[{WINDOW}]) - {healthy} > 0 and {wanted} offset {WINDOW} > 0",
            "20s",
            f"{model}: {{{{ $value }}}} replicas are down",
            "replica-down",
            "`jenga status` or Ray's dashboard says why; the log of the replica has the engine's last words",
            "critical",
        ),
    ]


def files(s: Source) -> dict[str, dict[str, Any]]:
    """Content of Prometheus' rule files, by name."""
    recording = [{"record": record.name, "expr": record.expr} for record in records(s)]
    alerting = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "runbook": f"{RUNBOOK}#{alert.anchor}: {alert.first_step}",
            },
        }
        for alert in alerts(s)
    ]
    return {
        "recording.yml": {"groups": [{"name": "jenga", "interval": INTERVAL, "rules": recording}]},
        "alerts.yml": {"groups": [{"name": "jenga alerts", "interval": INTERVAL, "rules": alerting}]},
    }
