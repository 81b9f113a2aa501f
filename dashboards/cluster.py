"""Dashboard "Cluster": replicas, HTTP and nodes, from Ray's own metrics (Ray Serve only)."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from dashboards import expressions as e
from dashboards.panels import Line, Text, number, page, series
from dashboards.source import Source

UID = "jenga-cluster"
GPU_ONLY = ("GPU utilisation", "GPU memory in use")
"""Panels that have no data on machines without GPUs."""


def dashboard(s: Source) -> Dashboard:
    """Build it; only Ray has these metrics."""
    application, service, node = ("application",), s.service, ("ip",)
    http = s.of_ray("ray_serve_num_http_requests_total", by=application)
    failed = s.of_ray("ray_serve_num_http_requests_total", 'status_code=~"5.."', by=application)
    board = page("Jenga: Cluster", UID, "Replicas, HTTP and nodes.", s, ("application", "deployment"))
    board = board.with_panel(
        number(
            Text(
                "Replicas missing",
                "short",
                "Replicas that should run less those that answer health checks, over all deployments.",
                "While one starts this is usual; for longer, jenga status or Ray's dashboard says why.",
            ),
            f"sum({e.wanted_replicas(s, service)}) - sum({e.healthy_replicas(s, service)})",
            bad_above=1,
        )
    )
    board = board.with_panel(
        number(
            Text(
                "Alerts",
                "short",
                "Alerts of this project that fire now; they need the rules of cluster/prometheus.",
                "Each alert names its section in docs/dashboards.md.",
            ),
            'count(ALERTS{alertstate="firing",alertname=~"Jenga.*"}) or vector(0)',
            bad_above=1,
        )
    )
    board = board.with_panel(
        number(
            Text(
                "Requests",
                "reqps",
                "HTTP requests per second that were answered.",
                "At zero while clients call: see whether the ingress is healthy and its port is reachable.",
            ),
            e.rate(http),
        )
    )
    board = board.with_panel(
        number(
            Text(
                "Failed",
                "percentunit",
                "Share of HTTP requests answered with a status of 500 or above.",
                "A replica died or is overloaded: see Replicas, and Time in queue (Requests).",
            ),
            # No series with such a status exists before the first one.
            f"({e.rate(failed)} or vector(0)) / ({e.rate(http)} > 0)",
            bad_above=0.01,
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Replicas",
                "short",
                "Replicas of each deployment that should run, and those that answer health checks.",
                "Healthy below wanted for longer than a start takes: the new engine fails, see its log.",
            ),
            Line(e.wanted_replicas(s, service), "{{deployment}} wanted"),
            Line(e.healthy_replicas(s, service), "{{deployment}} healthy"),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Requests in progress by replica",
                "short",
                "Requests that each replica is working on or holds in its queue.",
                "One replica far above the others for long: the router prefers its cache; see docs/routing.md, prices.",
            ),
            Line(
                e.total(s.of_ray("ray_serve_replica_processing_queries", by=service), s.engine),
                "{{deployment}} {{replica}}",
            ),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "HTTP requests by status",
                "reqps",
                "Answers per second by status code.",
                "4xx: clients send what the model refuses; 5xx: see Failed.",
            ),
            Line(e.rate(http, ("status_code",)), "{{status_code}}"),
            stacked=True,
        )
    )
    buckets = s.of_ray("ray_serve_http_request_latency_ms", part="bucket", by=application)
    board = board.with_panel(
        series(
            Text(
                "HTTP latency",
                "ms",
                "From the first byte of a request to the last of its answer; Ray's buckets are wide (10 s, then 60 s).",
                "Far above Whole request (Requests): the ingress lacks CPU, add replicas of it.",
            ),
            *[Line(e.quantile(q, buckets), name) for q, name in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))],
        )
    )
    board = board.with_row(Row("Nodes"))
    board = board.with_panel(
        series(
            Text(
                "Nodes",
                "short",
                "Nodes of the Ray cluster that are alive.",
                "A node that is lost takes its replicas with it; Ray starts them elsewhere where there is room.",
            ),
            Line(e.total(s.of_ray("ray_cluster_active_nodes")), "alive"),
            width=8,
        )
    )
    board = board.with_panel(
        series(
            Text(
                "CPU",
                "percent",
                "Share of each node's CPU that is in use.",
                "At 100 % on CPU flavours latencies rise with every request; on GPU nodes the ingress suffers first.",
            ),
            Line(e.total(s.of_ray("ray_node_cpu_utilization"), node), "{{ip}}"),
            width=8,
            maximum=100,
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Memory",
                "percentunit",
                "Share of each node's main memory that is in use.",
                "Above 95 % Ray kills workers: fewer replicas per node.",
            ),
            Line(
                f"{e.total(s.of_ray('ray_node_mem_used'), node)} / {e.total(s.of_ray('ray_node_mem_total'), node)}",
                "{{ip}}",
            ),
            width=8,
            maximum=1,
        )
    )
    board = board.with_panel(
        series(
            Text(
                GPU_ONLY[0],
                "percent",
                "Share of time in which each GPU ran a kernel.",
                "Low while requests wait: the engine is bound by its host (CPU, scheduler), or waits for memory.",
            ),
            Line(e.total(s.of_ray("ray_node_gpus_utilization"), ("ip", "GpuIndex")), "{{ip}} {{GpuIndex}}"),
            maximum=100,
        )
    )
    return board.with_panel(
        series(
            Text(
                GPU_ONLY[1],
                "decmbytes",
                "Memory of each GPU that is in use: weights, activations and the KV buffer.",
                "It is taken at the start and stays; what grows later is no KV memory.",
            ),
            Line(e.total(s.of_ray("ray_node_gram_used"), ("ip", "GpuIndex")), "{{ip}} {{GpuIndex}}"),
        )
    )
