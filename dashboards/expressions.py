"""PromQL of the quantities that panels, recording rules and alerts share, each stated once."""

from __future__ import annotations

from dashboards.source import Source
from jenga.metrics.memory import GROUP_CAUSES, POOL_CAUSES

WASTE = ("tail", "droppable", "padding", "stranded")
"""Causes of memory that nobody can use now although a group holds it (docs/memory.md)."""
CAUSES = GROUP_CAUSES + POOL_CAUSES

# Grafana's own choice of a window for rate(); the check puts a duration in its place.
RATE = "$__rate_interval"


def total(expression: str, by: tuple[str, ...] = ()) -> str:
    """Sum over all labels but `by`."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def rate(selector: str, by: tuple[str, ...] = (), window: str = RATE) -> str:
    """Sum of the increases per second of a counter.

    Counters of dead replicas stay exported within a Ray session, but do not rise: rates leave them out.
    """
    return total(f"rate({selector}[{window}])", by)


def quantile(q: float, buckets: str, by: tuple[str, ...] = (), window: str = RATE) -> str:
    """Quantile of a histogram's observations within the window; `buckets` is a selector of its buckets."""
    return f"histogram_quantile({q}, {rate(buckets, ('le', *by), window)})"


def waste_bytes(s: Source, by: tuple[str, ...] = ()) -> str:
    """Bytes lost to WASTE."""
    return total(s.ours("jenga_memory_bytes", f'state=~"{"|".join(WASTE)}"'), by)


def waste_ratio(s: Source, by: tuple[str, ...] = ()) -> str:
    """Share of the KV buffer that is lost to WASTE (0 to 1)."""
    return f"{waste_bytes(s, by)} / {total(s.ours('jenga_buffer_bytes'), by)}"


def stock_waste_ratio(s: Source, by: tuple[str, ...] = ()) -> str:
    """Share of the KV buffer that stock vLLM's plan would lose for the same requests."""
    return f"{total(s.ours('jenga_stock_wasted_bytes'), by)} / {total(s.ours('jenga_buffer_bytes'), by)}"


def hit_ratio(s: Source, by: tuple[str, ...] = (), window: str = RATE) -> str:
    """Share of looked-up tokens that a cached prefix spared (0 to 1)."""
    return share(s.ours("jenga_hit_tokens_total"), s.ours("jenga_lookup_tokens_total"), by, window)


def exact_ratio(s: Source, by: tuple[str, ...] = (), window: str = RATE) -> str:
    """Share of the router's predictions that came true to the token (0 to 1)."""
    name = "jenga_router_predictions_total"
    return share(s.ours(name, 'outcome="exact"'), s.ours(name), by, window)


def preempted_ratio(s: Source, by: tuple[str, ...] = (), window: str = RATE) -> str:
    """Preemptions per admission (0 to 1): each preempted request is admitted again."""
    return share(s.ours("jenga_preemptions_total"), s.ours("jenga_admitted_requests_total"), by, window)


def healthy_replicas(s: Source, by: tuple[str, ...]) -> str:
    """Replicas that answer Serve's health checks; 0, not nothing, where all of them are gone."""
    return f"count by ({', '.join(by)}) ({live_replicas(s)}) or 0 * {wanted_replicas(s, by)}"


def live_replicas(s: Source) -> str:
    """1 for each replica that answers health checks."""
    healthy = s.of_ray("ray_serve_deployment_replica_healthy", by=s.service)
    return f"max by ({', '.join(s.engine)}) ({healthy} == 1)"


def wanted_replicas(s: Source, by: tuple[str, ...]) -> str:
    """Replicas that should run; the greatest, for a new controller of Serve repeats what the old one said."""
    return f"max by ({', '.join(by)}) ({s.of_ray('ray_serve_autoscaling_target_replicas', by=s.service)})"


def share(part: str, whole: str, by: tuple[str, ...], window: str) -> str:
    """Quotient of two counters' rates; without events in the window there is no value, not a wrong one."""
    return f"{rate(part, by, window)} / ({rate(whole, by, window)} > 0)"
