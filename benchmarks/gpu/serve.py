"""One engine under load, told what to do by a file.

The engine is what `vllm serve` runs (AsyncLLM, engine core in a process of its own, async scheduling); clients live in
this process and take times where a client would.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import workloads
from benchmarks.gpu.workloads import Client, Workload

PROFILED_STEPS = 20


@dataclass
class Seen:
    """What the scheduler reported during a run."""

    resident: list[int] = field(default_factory=list)
    """Running requests, each time while others waited for memory."""
    running: list[int] = field(default_factory=list)
    preemptions: int = 0
    steps: list[tuple[float, int, int, int, int]] = field(default_factory=list)
    """Per step: seconds on this process's clock, requests running and waiting, tokens computed of prompts, tokens
    generated."""


def recorder(seen: list[Seen]) -> Any:
    """A logger of vLLM's statistics that fills the last of `seen`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            now = seen[-1]
            if scheduler_stats is not None:
                now.running.append(scheduler_stats.num_running_reqs)
                if scheduler_stats.num_waiting_reqs:
                    now.resident.append(scheduler_stats.num_running_reqs)
            if iteration_stats is not None:
                now.preemptions += iteration_stats.num_preempted_reqs
            if scheduler_stats is not None and iteration_stats is not None:
                now.steps.append(
                    (
                        round(time.perf_counter(), 6),
                        scheduler_stats.num_running_reqs,
                        scheduler_stats.num_waiting_reqs,
                        iteration_stats.prompt_token_stats.computed,
                        iteration_stats.num_generation_tokens,
                    )
                )

        def log_engine_initialized(self) -> None:
            pass

    return Recorder


async def load(engine: Any, workload: Workload, label: str, seen: Seen) -> dict[str, Any]:
    """Run one workload to its end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    first: list[float] = []
    later: list[float] = []
    totals = {"prompt": 0, "cached": 0, "said": 0}
    memory: dict[str, Any] | None = None
    gate = asyncio.Semaphore(workload.at_a_time or len(workload.clients))

    async def ask(client: Client, number: int) -> None:
        said: list[int] = []
        async with gate:
            for turn, (new, length) in enumerate(client.turns):
                said += new
                sampling = SamplingParams(
                    temperature=0,
                    max_tokens=length,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                totals["prompt"] += len(said)
                begun, head = time.perf_counter(), 0.0
                got: list[int] = []
                async for output in engine.generate(
                    {"prompt_token_ids": list(said)}, sampling, f"{label}-{number}-{turn}"
                ):
                    if not got:
                        head = time.perf_counter()
                        first.append(head - begun)
                        totals["cached"] += output.num_cached_tokens or 0
                    got += output.outputs[0].token_ids
                if len(got) > 1:
                    later.append((time.perf_counter() - head) / (len(got) - 1))
                totals["said"] += len(got)
                said += got

    async def look() -> None:
        """The engine's own account of its memory, once, when it is full."""
        nonlocal memory
        while not seen.resident:
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
        memory = await engine.engine_core.call_utility_async("jenga_memory")

    watch = asyncio.create_task(look()) if os.environ["JENGA"] == "1" else None
    begun = time.perf_counter()
    await asyncio.gather(*(ask(c, i) for i, c in enumerate(workload.clients)))
    taken = time.perf_counter() - begun
    if watch:
        watch.cancel()
    return {
        "workload": workload.name,
        "requests": len(first),
        "seconds": taken,
        "prompt_tokens": totals["prompt"],
        "cached_tokens": totals["cached"],
        "possible_tokens": workload.possible,
        "said_tokens": totals["said"],
        "said_per_s": totals["said"] / taken,
        "ttft_s": percentiles(first),
        "tpot_s": percentiles(later),
        "resident_mean": statistics.fmean(seen.resident) if seen.resident else None,
        "resident_most": max(seen.running, default=0),
        "steps": len(seen.running),
        "preemptions": seen.preemptions,
        "memory": memory,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p99."""
    ordered = sorted(values)
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]}


async def main(given: Path, taken: Path) -> None:
    """Start the engine, warm it up, run every workload as often as asked."""
    spec: dict[str, Any] = json.loads(given.read_text())
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    begun = time.perf_counter()
    seen = [Seen()]
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=spec["model"], skip_tokenizer_init=True, **spec["engine"]),
        stat_loggers=[recorder(seen)],
    )
    try:
        result: dict[str, Any] = {"start_s": time.perf_counter() - begun, "runs": []}
        result["weight_bytes"] = (await engine.collective_rpc("weight_bytes"))[0]
        if os.environ["JENGA"] == "1":
            report = await engine.engine_core.call_utility_async("jenga_memory")
            result["managed"] = report is not None
        # Kernels are compiled for sizes as they come: every workload runs once, smaller, before it counts.
        warm_up = [(name, max(8, size // 4), *more) for name, size, *more in spec["workloads"]] or [("chat", 2)]
        for number, (name, *sizes) in enumerate([*warm_up, *spec["workloads"]]):
            counts = number >= len(warm_up)
            for repeat in range(spec["repeats"] if counts else 1):
                await engine.reset_prefix_cache()
                seen.append(Seen())
                made = build(name, sizes, repeat)
                run = await load(engine, made, f"{number}-{repeat}", seen[-1])
                if repeat == 0:
                    run["step_times"] = seen[-1].steps
                if counts:
                    result["runs"].append(run)
                    taken.write_text(json.dumps(result))
            if counts and spec["profile"]:
                seen.append(Seen())
                await profiled(engine, build(name, sizes, spec["repeats"]), name, seen[-1])
    finally:
        engine.shutdown()


async def profiled(engine: Any, workload: Workload, name: str, seen: Seen) -> None:
    """Trace some steps in the middle of a run, whose times do not count."""
    await engine.reset_prefix_cache()
    await engine.start_profile(name, delay_iterations=40, max_iterations=PROFILED_STEPS)
    await load(engine, workload, f"profiled-{name}", seen)
    await engine.stop_profile()


def build(name: str, sizes: list[Any], repeat: int) -> Workload:
    """A workload by name; every repeat asks something else."""
    if name == "mooncake":
        requests, path, longest = sizes
        return workloads.mooncake(Path(path), requests, longest)
    return workloads.NAMES[name](100 + repeat, *sizes)


def run(given: Path, taken: Path) -> None:
    """`main`, in this process."""
    asyncio.run(main(given, taken))
