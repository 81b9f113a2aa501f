"""Routers beside each other on a simulated cluster: Mooncake's conversations, 16 replicas, memory short.

python benchmarks/routing_simulated.py --trace mooncake_conversation.jsonl [--models a,b] [--jobs 2] [--json FILE]

Each replica has the memory in which exact bytes would hold `--resident` requests, which is less than the trace's
distinct prompts by far, so every cache evicts.  The rate is `--load` times what the same cluster serves under p2c when
all requests wait from the start.  Prompts are cut to whole blocks of the trace (`jenga.traces.whole_blocks`) unless
`--as-is` is given.  Pages have at least 64 tokens: the trace knows prompts by blocks of 512, and smaller pages take
four times as long to simulate.  All routers see the same requests, prices and seeds; figures are means over `--seeds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track
from zoo import PARAMETERS, sizes, table

from jenga.bound import residency_bound
from jenga.models import load_model
from jenga.simulate import ROUTERS, StepCost, plan_for, simulate_cluster
from jenga.traces import read_mooncake, scaled, whole_blocks

MODELS = ("gemma-3-27b", "qwen3-next-80b", "granite-4-small", "kimi-linear-48b", "llama-3.1-8b")
CONTROL = "llama-3.1-8b"
PAGE_TOKENS = 64
FIGURES = (
    *("hit_tokens", "computed_prompt_tokens", "recomputed_prompt_tokens", "preempted_tokens", "preemptions"),
    *("seconds", "requests_per_s", "load_spread", "busy_share", "exact_share", "overpredicted_tokens"),
    *("underpredicted_tokens", "rejected"),
)


@dataclass(frozen=True)
class Case:
    """One model under all routers."""

    model: str
    trace: Path
    as_is: bool
    requests: int
    replicas: int
    resident: int
    load: float
    seeds: int


def run_case(case: Case) -> dict[str, Any]:
    """Simulate one case; means over the seeds."""
    start = time.perf_counter()
    spec = load_model(case.model)
    types = [
        kind if kind.is_state else replace(kind, block_tokens=max(PAGE_TOKENS, kind.block_tokens))
        for kind in spec.layer_types()
    ]
    served = list(read_mooncake(case.trace, case.requests))
    if not case.as_is:
        served = whole_blocks(served)
    memory = int(case.resident * residency_bound(types, sizes(served), 1).mean_bytes)
    plan = plan_for("jenga", spec.name, types, memory, served)
    billions, active = PARAMETERS[case.model]
    cost = StepCost(weight_bytes=2e9 * billions / spec.tp, active_parameters=1e9 * active / spec.tp)
    waiting = [replace(r, arrival_s=0.0) for r in served]
    capacity = simulate_cluster(plan, types, waiting, replicas=case.replicas, router="p2c", cost=cost).requests_per_s
    served = scaled(served, case.load * capacity)
    results: dict[str, Any] = {}
    for router in ROUTERS:
        runs = [
            simulate_cluster(plan, types, served, replicas=case.replicas, router=router, seed=seed, cost=cost)
            for seed in range(case.seeds)
        ]
        data = [r.to_dict() for r in runs]
        results[router] = {f: None if data[0][f] is None else mean(d[f] for d in data) for f in FIGURES}
        results[router]["ttft_s"] = {p: mean(d["ttft_s"][p] for d in data) for p in ("p50", "p90", "p99")}
        results[router]["recomputed_by_seed"] = [r.recomputed_prompt_tokens for r in runs]
    return {
        "model": case.model,
        "as_is": case.as_is,
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
        if name == "kv_full_only" and case["model"] != CONTROL and share > 0.8:
            found.append(f"recomputes {1 - share:.1%} fewer than {name}, target 20 %")
    return found


def report(console: Console, cases: Sequence[dict[str, Any]]) -> None:
    """Print a table per case, and what is missed."""
    names = ("router", "recomputed M", "computed M", "TTFT p50", "p90", "p99", "req/s", "spread", "preempt", "exact")
    for case in cases:
        shown = table(
            f"{case['model']}: {case['memory_bytes'] / 2**30:.1f} GiB each, {case['rate_requests_per_s']:.1f} "
            f"requests/s{', prompts as they are' if case['as_is'] else ''}",
            names,
        )
        for name, r in case["results"].items():
            shown.add_row(
                name,
                f"{r['recomputed_prompt_tokens'] / 1e6:.2f}",
                f"{r['computed_prompt_tokens'] / 1e6:.2f}",
                *(f"{r['ttft_s'][p]:.2f}" for p in ("p50", "p90", "p99")),
                f"{r['requests_per_s']:.2f}",
                f"{r['load_spread']:.2f}",
                f"{r['preemptions']:.0f}",
                "-" if r["exact_share"] is None else f"{r['exact_share']:.1%}",
            )
        console.print(shown)
        for miss in misses(case):
            console.print(f"[yellow]missed:[/] {case['model']}: jenga {miss}")


def main() -> None:
    """Parse arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--resident", type=int, default=48)
    parser.add_argument("--load", type=float, default=0.85)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("results/routing_simulated.json"))
    given = parser.parse_args()
    cases = [
        Case(m, given.trace, given.as_is, given.requests, given.replicas, given.resident, given.load, given.seeds)
        for m in given.models.split(",")
    ]
    console = Console()
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        done = list(track(pool.imap_unordered(run_case, cases), total=len(cases), console=Console(stderr=True)))
    done.sort(key=lambda case: [c.model for c in cases].index(case["model"]))
    report(console, done)
    # Cases of other models and of the other form of the trace stay.
    new = {(case["model"], case["as_is"]) for case in done}
    old = json.loads(given.json.read_text())["cases"] if given.json.exists() else []
    kept = [case for case in old if (case["model"], case["as_is"]) not in new]
    given.json.write_text(json.dumps({"cases": kept + done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
