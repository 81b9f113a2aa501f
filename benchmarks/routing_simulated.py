"""Routers beside each other on a simulated cluster: Mooncake's conversations, 16 replicas, memory short.

    python benchmarks/routing_simulated.py --trace mooncake_conversation.jsonl [--models a,b] [--routers a,b]
        [--windows 0,3000] [--loads 0.7,0.85] [--jobs 2] [--json FILE]

Each replica has the memory in which exact bytes would hold `--resident` requests, which is less than the trace's
distinct prompts by far, so every cache evicts.  The rate is `--load` times what the same cluster serves under p2c when
all requests wait from the start.  Prompts are cut to whole blocks of the trace (`jenga.traces.whole_blocks`) unless
`--as-is` is given.  Pages have at least 64 tokens: the trace knows prompts by blocks of 512, and smaller pages take
four times as long to simulate.  All routers see the same requests, prices and seeds; figures are means over `--seeds`.

`kv_full_only@vllm` and `prefix_text@vllm` are the peers as one gets them: those routers before stock vLLM 0.32's memory
management, with the same bytes.  All others have Jenga's engines behind them, so that they differ in placement alone.

Bounds beside them: *one engine* has the memory, the speed and the limits of all replicas, so nothing has to be placed;
*never evicting* has as much memory as it takes: what is left is computed again because no state or window was kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from zoo import PARAMETERS, sizes, table

from jenga.bound import residency_bound
from jenga.layers import LayerType
from jenga.models import load_model
from jenga.simulate import ROUTERS, Limits, StepCost, plan_for, simulate_cluster
from jenga.traces import TraceRequest, read_mooncake, scaled, whole_blocks

PEERS_ENGINES = ("kv_full_only@vllm", "prefix_text@vllm")
MODELS = ("gemma-3-27b", "qwen3-next-80b", "granite-4-small", "kimi-linear-48b", "llama-3.1-8b")
CONTROL = "llama-3.1-8b"
PAGE_TOKENS = 64
PLENTY = 8
"""Times the memory of all replicas, in which everything of a window of the trace stays cached."""
FIGURES = (
    *("hit_tokens", "computed_prompt_tokens", "recomputed_prompt_tokens", "elsewhere_prompt_tokens"),
    *("preempted_tokens", "preemptions"),
    *("seconds", "requests_per_s", "load_spread", "busy_share", "exact_share", "overpredicted_tokens"),
    *("underpredicted_tokens", "rejected"),
)


@dataclass(frozen=True)
class Case:
    """One model and part of the trace under all routers."""

    model: str
    trace: Path
    as_is: bool
    start: int
    requests: int
    replicas: int
    resident: int
    load: float
    seeds: int
    routers: tuple[str, ...]


def bounds(
    case: Case, types: Sequence[LayerType], served: Sequence[TraceRequest], memory: int, cost: StepCost
) -> dict[str, int]:
    """Prompt tokens recomputed by one engine of all replicas' size, and by one that evicts nothing."""
    n = case.replicas
    limits = Limits(batched_tokens=n * Limits.batched_tokens, sequences=n * Limits.sequences)
    faster = replace(
        cost,
        weight_bytes=n * cost.weight_bytes,  # a step takes as long, and does the work of all
        bytes_per_s=n * cost.bytes_per_s,
        flops_per_s=n * cost.flops_per_s,
    )
    found = {}
    for name, times in (("one engine", n), ("never evicting", n * PLENTY)):
        plan = plan_for("jenga", case.model, types, times * memory, served)
        result = simulate_cluster(plan, types, served, replicas=1, router="round_robin", cost=faster, limits=limits)
        found[name] = result.recomputed_prompt_tokens
    return found


def engine(router: str) -> str:
    """The strategy of the engines behind a router, which may be named as ROUTER@STRATEGY."""
    return router.partition("@")[2] or "jenga"


def run_case(case: Case) -> dict[str, Any]:
    """Simulate one case; means over the seeds."""
    start = time.perf_counter()
    spec = load_model(case.model)
    types = [
        kind if kind.is_state else replace(kind, block_tokens=max(PAGE_TOKENS, kind.block_tokens))
        for kind in spec.layer_types()
    ]
    served = list(read_mooncake(case.trace, case.start + case.requests))[case.start :]
    if not case.as_is:
        served = whole_blocks(served)
    memory = int(case.resident * residency_bound(types, sizes(served), 1).mean_bytes)
    engines = {name: plan_for(name, spec.name, types, memory, served) for name in {"jenga", *map(engine, case.routers)}}
    plan = engines["jenga"]
    billions, active = PARAMETERS[case.model]
    cost = StepCost(weight_bytes=2e9 * billions / spec.tp, active_parameters=1e9 * active / spec.tp)
    waiting = [replace(r, arrival_s=0.0) for r in served]
    capacity = simulate_cluster(plan, types, waiting, replicas=case.replicas, router="p2c", cost=cost).requests_per_s
    served = scaled(served, case.load * capacity)
    results: dict[str, Any] = {}
    for router in case.routers:
        name, on = router.partition("@")[0], engines[engine(router)]
        runs = [
            simulate_cluster(on, types, served, replicas=case.replicas, router=name, seed=seed, cost=cost)
            for seed in range(case.seeds)
        ]
        data = [r.to_dict() for r in runs]
        results[router] = {f: None if data[0][f] is None else mean(d[f] for d in data) for f in FIGURES}
        results[router]["ttft_s"] = {p: mean(d["ttft_s"][p] for d in data) for p in ("p50", "p90", "p99")}
        results[router]["recomputed_by_seed"] = [r.recomputed_prompt_tokens for r in runs]
    return {
        "bounds": bounds(case, types, served, memory, cost),
        "model": case.model,
        "as_is": case.as_is,
        "start": case.start,
        "load": case.load,
        "resident": case.resident,
        "requests": case.requests,
        "replicas": case.replicas,
        "seeds": case.seeds,
        "memory_bytes": memory,
        "capacity_requests_per_s": capacity,
        "rate_requests_per_s": case.load * capacity,
        "prompt_tokens": sum(r.prompt_tokens for r in served),
        "wall_s": time.perf_counter() - start,
        "results": results,
    }


def misses(case: dict[str, Any]) -> list[str]:
    """Targets that `jenga` misses."""
    results = case["results"]
    jenga = results["jenga"]
    found = []
    for name, other in results.items():
        if name == "jenga":
            continue
        share = jenga["recomputed_prompt_tokens"] / other["recomputed_prompt_tokens"]
        if share > 1:
            found.append(f"recomputes {share - 1:.1%} more than {name}")
        slower = jenga["ttft_s"]["p99"] / other["ttft_s"]["p99"]
        if slower > 1:
            found.append(f"TTFT p99 {slower - 1:.1%} longer than with {name}")
        if name.startswith("kv_full_only") and case["model"] != CONTROL and share > 0.8:
            found.append(f"recomputes {1 - share:.1%} fewer than {name}, target 20 %")
    return found


def report(console: Console, cases: Sequence[dict[str, Any]]) -> None:
    """Print a table per case, and what is missed."""
    names = (
        "router",
        "recomputed M",
        "elsewhere M",
        "computed M",
        "TTFT p50",
        "p90",
        "p99",
        "req/s",
        "spread",
        "exact",
    )
    for case in cases:
        shown = table(
            f"{case['model']}, requests from {case['start']} on: {case['memory_bytes'] / 2**30:.1f} GiB each, "
            f"{case['rate_requests_per_s']:.1f} requests/s{', prompts as they are' if case['as_is'] else ''}",
            names,
        )
        for name, r in case["results"].items():
            shown.add_row(
                name,
                f"{r['recomputed_prompt_tokens'] / 1e6:.2f}",
                f"{r['elsewhere_prompt_tokens'] / 1e6:.3f}",
                f"{r['computed_prompt_tokens'] / 1e6:.2f}",
                *(f"{r['ttft_s'][p]:.2f}" for p in ("p50", "p90", "p99")),
                f"{r['requests_per_s']:.2f}",
                f"{r['load_spread']:.2f}",
                "-" if r["exact_share"] is None else f"{r['exact_share']:.1%}",
            )
        for name, tokens in case["bounds"].items():
            shown.add_row(f"({name})", f"{tokens / 1e6:.2f}")
        console.print(shown)
        for miss in misses(case):
            console.print(f"[yellow]missed:[/] {case['model']}: jenga {miss}")
    if len(cases) > 1:
        console.print(summary(cases))


def summary(cases: Sequence[dict[str, Any]]) -> Table:
    """By model, `jenga` over each other router: mean over the cases, and the least and the most of them."""
    shown = table("jenga over another router, all cases", ("model", "router", "recomputed tokens", "TTFT p99", "cases"))
    for model in dict.fromkeys(case["model"] for case in cases):
        mine = [case["results"] for case in cases if case["model"] == model]
        for name in mine[0]:
            if name != "jenga":
                tokens = [r["jenga"]["recomputed_prompt_tokens"] / r[name]["recomputed_prompt_tokens"] for r in mine]
                waits = [r["jenga"]["ttft_s"]["p99"] / r[name]["ttft_s"]["p99"] for r in mine]
                cells = (f"{mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (tokens, waits))
                shown.add_row(model, name, *cells, str(len(mine)))
    return shown


def main() -> None:
    """Parse arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--routers", default=",".join((*ROUTERS, *PEERS_ENGINES)))
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--windows", default="0", help="first requests of the parts of the trace to serve")
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--resident", type=int, default=48)
    parser.add_argument("--loads", default="0.85")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("results/routing_simulated.json"))
    given = parser.parse_args()
    common = (given.requests, given.replicas, given.resident)
    cases = [
        Case(
            model,
            given.trace,
            given.as_is,
            int(start),
            *common,
            float(load),
            given.seeds,
            tuple(given.routers.split(",")),
        )
        for model in given.models.split(",")
        for start in given.windows.split(",")
        for load in given.loads.split(",")
    ]
    console = Console(width=130)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        done = list(track(pool.imap(run_case, cases), total=len(cases), console=Console(stderr=True)))
    report(console, done)
    # Cases of other models, parts and loads, and of the other form of the trace, stay.
    key = itemgetter("model", "as_is", "start", "load")
    old = json.loads(given.json.read_text())["cases"] if given.json.exists() else []
    kept = [case for case in old if key(case) not in set(map(key, done))]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"cases": kept + done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
