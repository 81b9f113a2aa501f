"""What metrics cost the engine's core, as a share of the scheduler's processor time.

    python benchmarks/metrics.py

Two things cost: a report every four seconds (measured whole: collecting, making it plain data, encoding it as vLLM
does), and what is counted in steps (how often each counter is met is counted, and the time of one is measured alone; a
difference of whole steps would be lost in their noise).  Reports weigh more the fewer steps there are between two, so
the share is given for short and for long forward passes.  Schedulers run as in `scheduler_step.py`: a full house of
requests, prefix caching on, every arrival evicts.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scheduler_step import BATCHED_TOKENS, PROMPT, WARM_STEPS, Engine, Figure, Planner
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.serial_utils import MsgpackEncoder, UtilityResult

from jenga.allocator import CLOCK_HZ, TwoLevelAllocator
from jenga.metrics.engine import PERIOD, EngineReport
from jenga.metrics.stock import StockPlan
from jenga.models import ModelSpec
from jenga.vllm_plugin.engine import report
from jenga.vllm_plugin.planning import stock_group

MODELS = ("gemma-3-27b", "falcon-h1-34b", "qwen3-next-80b")
FORWARD_MS = (10, 50)
TARGET = 0.01
EVERY = 5
"""Steps between two reports that are timed."""


def seconds_of(call: Callable[[], Any], times: int = 20_000) -> float:
    """Processor time of one call, the loop's own taken off."""

    def spent(what: Callable[[], Any]) -> float:
        begin = time.thread_time()
        for _ in range(times):
            what()
        return time.thread_time() - begin

    return max(0.0, min(spent(call) for _ in range(5)) - min(spent(lambda: None) for _ in range(5))) / times


def counter_costs() -> dict[str, float]:
    """Microseconds of one count: the clock's step, an eviction."""
    pool = TwoLevelAllocator(4, [2])
    group = pool._groups[0]
    plain = seconds_of(lambda: pool.tick())
    timed = seconds_of(lambda: pool.tick(int(time.monotonic() * CLOCK_HZ)))
    return {"clock": 1e6 * max(0.0, timed - plain), "eviction": 1e6 * seconds_of(lambda: group.evict(0, 1, 12345))}


def evictions(scheduler: Any) -> int:
    """Evictions so far."""
    allocator = scheduler.kv_cache_manager.coordinator.allocator
    return sum(sum(allocator.eviction_ages(g)[0]) for g in range(len(allocator.ratios)))


def measure(planner: Planner, model: ModelSpec, requests: int, steps: int, seed: int) -> dict[str, float]:
    """Microseconds of a step and of a report, the report's bytes, and evictions per step."""
    engine = Engine(*planner.scheduler(model, requests, True), requests=requests, seed=seed)
    scheduler: Any = engine.scheduler
    config, stock = planner.plan(model, requests, False)
    scheduler.kv_cache_manager.coordinator.kv_cache_config.stock = StockPlan.of(
        kv_cache_utils._pool_bytes_per_block(config, stock.kv_cache_groups), map(stock_group, stock.kv_cache_groups)
    )
    encoder = MsgpackEncoder()
    for _ in range(requests * PROMPT // BATCHED_TOKENS + WARM_STEPS):
        engine.step()
    gc.collect()
    gc.disable()
    before, stepping, reporting, sizes = evictions(scheduler), 0.0, 0.0, 0
    for number in range(steps):
        stepping += sum(engine.step())
        if number % EVERY == 0:
            begin = time.thread_time()
            data = report(scheduler.kv_cache_manager.coordinator, scheduler).to_dict()
            answer = UtilityOutput(0, result=UtilityResult(data))
            sent = encoder.encode(EngineCoreOutputs(utility_output=answer))
            reporting += 1e6 * (time.thread_time() - begin)
            sizes = sum(memoryview(part).nbytes for part in sent)
    gc.enable()
    held = EngineReport.from_dict(data)
    assert held.requests.resident > 0.8 * requests, "the house is not full"
    assert held.stock is not None, "vLLM's own plan was not compared"
    return {
        "step": stepping / steps,
        "report": reporting / -(-steps // EVERY),
        "bytes": float(sizes),
        "evictions": (evictions(scheduler) - before) / steps,
    }


def share(run: dict[str, float], costs: dict[str, float], forward_ms: float) -> float:
    """Of the scheduler's processor time, where a forward pass takes so long between two steps."""
    steps = PERIOD * 1e6 / (run["step"] + 1000 * forward_ms)
    counting = costs["clock"] + run["evictions"] * costs["eviction"]
    return (run["report"] / steps + counting) / run["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("results/metrics.json"))
    arguments = parser.parse_args()
    init_none_hash(sha256)
    costs = counter_costs()
    shares = [f"share, {ms} ms forward" for ms in FORWARD_MS]
    table = Table("model", "requests", "step, µs", "report, µs", "report, bytes", "evictions/step", *shares)
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "period_seconds": PERIOD,
        "target_share": TARGET,
        "counter_microseconds": costs,
        "unit": "microseconds of processor time; figures are median, lowest and highest of the repeats",
        "models": {},
    }
    dearest = 0.0
    with tempfile.TemporaryDirectory() as folder, Progress(transient=True) as progress:
        planner = Planner(Path(folder))
        bar = progress.add_task("", total=len(arguments.models) * len(arguments.requests) * arguments.repeats)
        for name in arguments.models:
            model = planner.model(name)
            rows = result["models"][name] = {}
            for requests in arguments.requests:
                runs = []
                for seed in range(arguments.repeats):
                    progress.update(bar, description=f"{name}, {requests} requests")
                    runs.append(measure(planner, model, requests, arguments.steps, seed))
                    progress.advance(bar)
                figures = {part: Figure.of([run[part] for run in runs]) for part in runs[0]}
                parts = {ms: Figure.of([share(run, costs, ms) for run in runs]) for ms in FORWARD_MS}
                dearest = max(dearest, *(figure.median for figure in parts.values()))
                rows[str(requests)] = {part: vars(figure) for part, figure in figures.items()} | {
                    f"share_{ms}_ms": vars(figure) for ms, figure in parts.items()
                }
                table.add_row(
                    name if requests == arguments.requests[0] else "",
                    str(requests),
                    figures["step"].text(0),
                    figures["report"].text(0),
                    f"{figures['bytes'].median:,.0f}",
                    f"{figures['evictions'].median:.2f}",
                    *(f"{figure.median:.2%} ({figure.low:.2%} to {figure.high:.2%})" for figure in parts.values()),
                )
            table.add_section()
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(width=170)
    console.print(table)
    console.print(
        f"a count of the clock: {costs['clock']:.2f} µs a step; of an eviction: {costs['eviction']:.2f} µs; "
        f"highest median share {dearest:.2%}, target {TARGET:.0%}; saved as {arguments.json}"
    )


if __name__ == "__main__":
    main()
