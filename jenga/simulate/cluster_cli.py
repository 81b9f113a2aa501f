"""The cluster mode of `jenga simulate`: reading its settings, and its table."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jenga.layers import LayerType
from jenga.simulate.cluster import ClusterResult, simulate_cluster
from jenga.simulate.cost import StepCost
from jenga.simulate.engine import Limits
from jenga.simulate.planning import plan_for
from jenga.simulate.routers import ROUTERS
from jenga.strategies import STRATEGIES
from jenga.terminal import table_console
from jenga.traces import TraceRequest


def router_names(replicas: int | None, router: str | None) -> list[str]:
    """The routers to compare; none if no cluster is asked for.

    Raises:
        typer.BadParameter: one of the two settings without the other, or an unknown router.
    """
    if replicas is None and router is None:
        return []
    if router is None:
        raise typer.BadParameter(f"--replicas {replicas} needs --router: some of {', '.join(ROUTERS)}, or all")
    if replicas is None:
        raise typer.BadParameter(f"--router {router} needs --replicas, the number of engines to place requests on")
    names = list(ROUTERS) if router == "all" else [name.strip() for name in router.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"--router {router!r} names none; known: {', '.join(ROUTERS)}, all")
    for name in names:
        if name not in ROUTERS:
            raise typer.BadParameter(f"--router {name!r} is not known; choose some of {', '.join(ROUTERS)}, or all")
    return names


def run_routers(
    names: Sequence[str],
    replicas: int,
    strategies: Sequence[str],
    model: str,
    types: Sequence[LayerType],
    memory_bytes: int,
    trace: Sequence[TraceRequest],
    cost: StepCost,
    limits: Limits,
    seed: int,
) -> list[ClusterResult]:
    """Serve the trace once for each router, with progress shown.

    Raises:
        typer.BadParameter: not exactly one strategy.
        jenga.strategies.PlanError: no such strategy, or too little memory.
    """
    if len(strategies) != 1:
        raise typer.BadParameter(
            f"--strategy {','.join(strategies)}: all replicas have the same; give one of {', '.join(STRATEGIES)}"
        )
    plan = plan_for(strategies[0], model, types, memory_bytes, trace)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for name in names:
            task = bar.add_task(name, total=len(trace))

            def follow(done: int, task: object = task) -> None:
                if done % 16 == 0 or done == len(trace):
                    bar.update(task, completed=done)  # type: ignore[arg-type]

            results.append(
                simulate_cluster(
                    plan,
                    types,
                    trace,
                    replicas=replicas,
                    router=name,
                    seed=seed,
                    cost=cost,
                    limits=limits,
                    progress=follow,
                )
            )
    return results


def print_routers(results: Sequence[ClusterResult]) -> None:
    """A table with one row for each router."""
    console = table_console()
    first = results[0]
    console.print(cluster_table(results))
    console.print(
        "hits: share of the prompt tokens; recomputed: prompt tokens that an earlier request had too; elsewhere: those "
        "of them that another replica had when the request was placed; spread: tokens computed by the busiest replica "
        "over the mean; exact: requests that found what the router predicted."
    )
    if first.rejected:
        console.print(f"[yellow]note:[/] {first.rejected} requests do not fit into an empty buffer")


def cluster_table(results: Sequence[ClusterResult]) -> Table:
    """One row for each router."""
    first = results[0]
    table = Table(
        title=f"{first.model}, strategy {first.strategy}: {len(first.replicas)} replicas, {first.requests} requests, "
        f"{first.prompt_tokens:,} prompt tokens",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = (
        "router",
        "hits",
        "recomputed",
        "elsewhere",
        "TTFT p50",
        "p90",
        "p99",
        "req/s",
        "spread",
        "preempt",
        "exact",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "router" else "right", no_wrap=True)
    for r in results:
        table.add_row(
            r.router,
            f"{r.hit_tokens / r.prompt_tokens:.1%}" if r.prompt_tokens else "-",
            f"{r.recomputed_prompt_tokens:,}",
            f"{r.elsewhere_prompt_tokens:,}",
            *(f"{seconds:.2f}s" for seconds in (r.ttft_s.p50, r.ttft_s.p90, r.ttft_s.p99)),
            f"{r.requests_per_s:.3g}",
            f"{r.load_spread:.2f}",
            str(r.preemptions),
            "-" if r.exact_share is None else f"{r.exact_share:.1%}",
        )
    return table
