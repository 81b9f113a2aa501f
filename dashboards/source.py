"""What Prometheus calls the metrics: Ray's agent prefixes names and adds labels, plain `vllm serve` does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from jenga.metrics.definitions import REGISTRY, VLLM_METRICS

VLLM = {metric.name: metric.kind for metric in VLLM_METRICS}
RAY = {
    "ray_cluster_active_nodes": "gauge",
    "ray_node_cpu_utilization": "gauge",
    "ray_node_mem_used": "gauge",
    "ray_node_mem_total": "gauge",
    "ray_node_gpus_utilization": "gauge",
    "ray_node_gram_used": "gauge",
    "ray_serve_autoscaling_target_replicas": "gauge",
    "ray_serve_deployment_replica_healthy": "gauge",
    "ray_serve_http_request_latency_ms": "histogram",
    "ray_serve_num_http_requests_total": "counter",
    "ray_serve_num_ongoing_http_requests": "gauge",
    "ray_serve_replica_processing_queries": "gauge",
}
"""Of Ray 2.60's metrics, those that panels and rules use."""

VARIABLE_OF = {
    "application": "application",
    "deployment": "deployment",
    "model_name": "model",
    "replica": "replica",
    "ReplicaId": "replica",
    "instance": "replica",
}
"""The dashboard variable that narrows each label."""


class UnknownMetricError(ValueError):
    """An expression names a metric that nothing exports; the message says where it was looked for."""


@dataclass(frozen=True)
class Source:
    """Names and labels under Ray Serve, or (`ray=False`) of engines started by `vllm serve`.

    `filtered`: selectors are narrowed by the dashboards' variables; rules have none.
    """

    ray: bool = True
    filtered: bool = True

    @property
    def unfiltered(self) -> Source:
        """The same names, for rules."""
        return replace(self, filtered=False)

    @property
    def replica(self) -> str:
        """Label that tells engines apart in our metrics."""
        return "replica" if self.ray else "instance"

    @property
    def vllm_replica(self) -> str:
        """The same in vLLM's metrics."""
        return "ReplicaId" if self.ray else "instance"

    @property
    def variables(self) -> tuple[str, ...]:
        """Dashboard variables that narrow engines' metrics, each narrowed by those before it."""
        return ("application", "deployment", "model", "replica") if self.ray else ("model", "replica")

    def label_of(self, variable: str) -> str:
        """The label in our metrics that a variable narrows."""
        return {"model": "model_name", "replica": self.replica}.get(variable, variable)

    @property
    def engine(self) -> tuple[str, ...]:
        """Labels that name one engine in our metrics."""
        return (*self.service, self.replica)

    @property
    def service(self) -> tuple[str, ...]:
        """Labels that name the engines of one model in our metrics."""
        return ("application", "deployment") if self.ray else ("model_name",)

    def ours(self, name: str, *matchers: str, part: str = "") -> str:
        """Selector of one of Jenga's metrics; `part` is a histogram's (bucket, sum or count).

        Raises:
            UnknownMetricError: the registry does not have it, or not with this part.
        """
        metric = REGISTRY.get(name)
        _require(name, metric.kind if metric else None, part, "jenga.metrics.definitions")
        if metric and metric.source == "router":
            # Of an ingress, whose deployment and replica are no engine's.
            labels: tuple[str, ...] = ("application",)
        else:
            labels = tuple(self.label_of(variable) for variable in self.variables)
        return self._selector(("ray_" if self.ray else "") + name, part, labels, matchers)

    def vllm(self, name: str, *matchers: str, part: str = "") -> str:
        """Selector of one of vLLM's metrics, by its own name (`vllm:...`)."""
        kind = VLLM.get(name)
        _require(name, kind, part, "the vLLM part of jenga.metrics.definitions")
        exported = "ray_" + name.replace(":", "_") if self.ray else name
        exported += "_total" if kind == "counter" else ""
        return self._selector(exported, part, ("model_name", self.vllm_replica), matchers)

    def of_ray(self, name: str, *matchers: str, part: str = "", by: tuple[str, ...] = ()) -> str:
        """Selector of one of Ray's metrics; `by` are its labels that variables narrow."""
        _require(name, RAY.get(name), part, "dashboards.source.RAY")
        return self._selector(name, part, by, matchers)

    def _selector(self, name: str, part: str, labels: Iterable[str], matchers: Iterable[str]) -> str:
        narrowed = [f'{label}=~"${VARIABLE_OF[label]}"' for label in labels] if self.filtered else []
        inside = ",".join([*narrowed, *matchers])
        return name + (f"_{part}" if part else "") + (f"{{{inside}}}" if inside else "")


def _require(name: str, kind: str | None, part: str, where: str) -> None:
    if kind is None:
        raise UnknownMetricError(f"no metric {name!r} in {where}")
    if (kind == "histogram") != (part in ("bucket", "sum", "count")):
        raise UnknownMetricError(f"{name!r} is a {kind} and has no part {part!r} (bucket, sum, count: histograms only)")
