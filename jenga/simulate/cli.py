"""`jenga simulate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jenga.checkpoints import PASS_TOKENS

if TYPE_CHECKING:
    from jenga.simulate import ClusterResult, HitBound, SimulationResult, StepCost
    from jenga.traces import TraceRequest


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command("simulate")(simulate)


def simulate(
    model: Annotated[str, typer.Option(help="A model of the zoo, or a .yaml description.")],
    memory: Annotated[str, typer.Option(help="KV memory of one tensor-parallel rank, such as 40GiB.")],
    trace: Annotated[
        str, typer.Option(help="A file in Mooncake's format, or chat, documents, agents.", metavar="FILE|NAME")
    ] = "chat",
    strategy: Annotated[
        str, typer.Option(help="Strategies to compare, separated by commas, or all.", metavar="A,B,...|all")
    ] = "all",
    rate: Annotated[
        str | None,
        typer.Option(
            help="Requests per second (Poisson; with --replicas a file's own times, scaled), 'trace' for the file's "
            "own times, or 'max': all wait from the start [max; with --replicas: trace].",
            metavar="N|trace|max",
        ),
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests to serve [all of a file, else 1000].")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel degree [the model's own].")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Data type of keys and values, such as fp8.")] = None,
    state_dtype: Annotated[
        str | None, typer.Option(help="Data type of recurrent states [default: the model file's, else float32].")
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Most requests that run at once.")] = 1024,
    batched_tokens: Annotated[int, typer.Option(min=1, help="Most tokens computed in a step.")] = 8192,
    pass_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens for whose sake a prefill pauses to keep a recurrent state.")
    ] = PASS_TOKENS,
    step_cost: Annotated[
        Path | None, typer.Option(help="JSON file with constants of the step-cost model.", metavar="FILE")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Simulate a cluster of so many engines behind a router.")
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="Routers to compare: jenga, kv_full_only, prefix_text, p2c, round_robin.", metavar="A,B,...|all"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of synthetic traces, arrivals and routers.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results here.", metavar="FILE")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write pictures into this folder.", metavar="DIR")] = None,
) -> None:
    """Serve a trace on a simulated engine under several memory strategies, and compare them.

    The allocator, the layer types' rules and the prefix cache are the real ones; only the time of a step is modelled.
    The last row, exact, is the bound: memory counted in bytes.

    With --replicas and --router: a cluster of such engines, one --strategy, and a row for each router.
    """
    from jenga.models import ModelError
    from jenga.strategies import PlanError
    from jenga.traces import TraceError

    try:
        done = _run(
            model, memory, trace, strategy, rate, requests, tp, kv_dtype, state_dtype, max_sequences, batched_tokens,
            pass_tokens, step_cost, seed, replicas, router,
        )  # fmt: skip
    except (ModelError, PlanError, TraceError, typer.BadParameter) as error:
        _fail(str(error))
    if isinstance(done, list):
        from jenga.simulate.cluster_cli import print_routers

        print_routers(done)
        data: dict[str, object] = {"results": [r.to_dict() for r in done]}
    else:
        results, bound, prompt_tokens = done
        _tables(results, bound, prompt_tokens)
        data = {"bound": asdict(bound), "results": [r.to_dict() for r in results]}
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(data, indent=1))
        except OSError as error:
            _fail(f"--json {json_file}: {error.strerror}; give a file in a folder that exists")
    if plot is not None:
        from jenga.simulate.plots import plot as draw
        from jenga.simulate.plots import plot_routers

        try:
            paths = plot_routers(done, plot) if isinstance(done, list) else draw(results, plot)
        except ModuleNotFoundError:
            _fail("--plot needs matplotlib: install jenga-serve[plot], or leave --plot out")
        except OSError as error:
            _fail(f"--plot {plot}: {error.strerror}; give a folder that can be written")
        for path in paths:
            typer.echo(f"wrote {path}")


def _run(
    model: str,
    memory: str,
    trace: str,
    strategy: str,
    rate: str | None,
    requests: int | None,
    tp: int | None,
    kv_dtype: str | None,
    state_dtype: str | None,
    max_sequences: int,
    batched_tokens: int,
    pass_tokens: int,
    step_cost: Path | None,
    seed: int,
    replicas: int | None,
    router: str | None,
) -> tuple[list[SimulationResult], HitBound, int] | list[ClusterResult]:
    from rich.progress import Progress

    from jenga.models import check_dtype, load_model
    from jenga.simulate import Limits, dense_bytes_per_token, exact_plan, hit_bound, plan_for, simulate
    from jenga.simulate.cluster_cli import router_names, run_routers
    from jenga.strategies import STRATEGIES
    from jenga.units import parse_size

    try:
        memory_bytes = parse_size(memory, "--memory")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    routers = router_names(replicas, router)
    spec = load_model(model)
    types = spec.layer_types(tp, check_dtype(kv_dtype, "--kv-dtype"), check_dtype(state_dtype, "--state-dtype"))
    cost = _step_cost(step_cost)
    served = _trace(trace, rate, requests, seed, spec.image_tokens, cluster=bool(routers))
    names = list(STRATEGIES) if strategy == "all" else [name.strip() for name in strategy.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"--strategy {strategy!r} names none; known: {', '.join(STRATEGIES)}, all")
    limits = Limits(batched_tokens=batched_tokens, sequences=max_sequences, pass_tokens=pass_tokens)
    if replicas is not None:
        return run_routers(routers, replicas, names, spec.name, types, memory_bytes, served, cost, limits, seed)
    plans = [plan_for(name, spec.name, types, memory_bytes, served) for name in names]
    plans.append(exact_plan(spec.name, types, memory_bytes))
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for plan in plans:
            task = bar.add_task(plan.strategy, total=len(served))

            def follow(done: int, task: object = task) -> None:
                if done % 16 == 0 or done == len(served):
                    bar.update(task, completed=done)  # type: ignore[arg-type]

            results.append(simulate(plan, types, served, cost=cost, limits=limits, progress=follow))
    bound = hit_bound(served, dense_bytes_per_token(types), memory_bytes)
    return results, bound, sum(r.prompt_tokens for r in served)


def _trace(
    trace: str, rate: str | None, requests: int | None, seed: int, image_tokens: int, cluster: bool
) -> list[TraceRequest]:
    from jenga.traces import SYNTHETIC, TraceError, arrivals, chat, read_mooncake, scaled

    if trace == "chat":
        served = list(chat(requests or 1000, seed, image_tokens))
    elif trace in SYNTHETIC:
        served = list(SYNTHETIC[trace](requests or 1000, seed))
    elif "." not in trace and "/" not in trace:
        raise TraceError(f"--trace {trace!r} is neither a file nor one of {', '.join(SYNTHETIC)}")
    else:
        served = list(read_mooncake(Path(trace), requests))
    if not served:
        raise TraceError(f"--trace {trace}: it holds no requests")
    rate = rate or ("trace" if cluster else "max")
    if rate == "trace":
        if trace in SYNTHETIC:
            raise TraceError(f"--rate trace: {trace} has no times of its own; give a number, or max")
        return served
    if rate == "max":
        return list(arrivals(served, None))
    try:
        per_second = float(rate)
    except ValueError:
        raise TraceError(f"--rate {rate!r} is not a number of requests per second, 'trace' or 'max'") from None
    if cluster and trace not in SYNTHETIC:
        return scaled(served, per_second)
    return list(arrivals(served, per_second, seed))


def _step_cost(path: Path | None) -> StepCost:
    from jenga.simulate import StepCost
    from jenga.traces import TraceError

    if path is None:
        return StepCost()
    try:
        return StepCost.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise TraceError(f"--step-cost {path}: {getattr(error, 'strerror', None) or error}") from None


def _tables(results: list[SimulationResult], bound: HitBound, prompt_tokens: int) -> None:
    from jenga.simulate import CAUSES
    from jenga.terminal import table_console

    console = table_console()
    exact = results[-1]
    memory = Table(
        title=f"{exact.model}: {exact.requests} requests, {prompt_tokens:,} prompt tokens", title_justify="left"
    )
    for name in ("strategy", "resident", "peak", "of exact", "waste", "tails", "preempted", "recomputed"):
        memory.add_column(name, justify="left" if name == "strategy" else "right")
    serving = _table("Prefix hits and speed")
    for name in ("strategy", "hit tokens", "share", "step", "requests/s", "tokens/s", "TTFT p50", "p90", "p99"):
        serving.add_column(name, justify="left" if name == "strategy" else "right")
    for r in results:
        memory.add_row(
            r.strategy,
            f"{r.resident_mean:.1f}",
            str(r.resident_peak),
            f"{r.resident_mean / exact.resident_mean:.1%}" if exact.resident_mean else "-",
            f"{r.waste():.2%}",
            f"{r.steady()['tail']:.2%}",
            str(r.preemptions),
            f"{r.recomputed_tokens:,}",
        )
        serving.add_row(
            r.strategy,
            f"{r.hit_tokens:,}",
            f"{r.hit_share:.1%}",
            str(r.hit_granularity),
            f"{r.requests_per_s:.3g}",
            f"{r.tokens_per_s:,.0f}",
            *(f"{seconds:.2f} s" for seconds in (r.ttft_s.p50, r.ttft_s.p90, r.ttft_s.p99)),
        )
    causes = _table("The buffer while memory is short, in %")
    causes.add_column("strategy")
    for cause in CAUSES[:-1]:
        causes.add_column(cause, justify="right")
    for r in results:
        steady = r.steady()
        causes.add_row(r.strategy, *(f"{100 * steady[cause]:.2f}" for cause in CAUSES[:-1]))
    for table in (memory, serving, causes):
        console.print(table)
    console.print(
        f"Hit tokens of a clairvoyant cache, at most: {bound.limited:,}; with unlimited memory {bound.unlimited:,}."
    )
    for r in results:
        if r.rejected:
            console.print(f"[yellow]note:[/] {r.strategy}: {r.rejected} requests do not fit into the empty buffer")
        if not r.saturated_share:
            console.print(f"[yellow]note:[/] {r.strategy}: memory was never short; residency says nothing of it")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/] {message}", soft_wrap=True, highlight=False)
    raise typer.Exit(1)
