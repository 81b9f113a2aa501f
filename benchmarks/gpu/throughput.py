"""Capacity and throughput: Jenga, stock vLLM, and vLLM with its hybrid manager off, with the same KV bytes.

One engine after the other has the GPU to itself and runs every workload several times, other requests each time.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import models, processes, serve
from jenga.checkpoints import PASS_TOKENS

GIB = 1 << 30
LIMIT_S = 420
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512]
"""Batches (tokens) for which CUDA graphs are captured."""
COMPILED = {"compilation_config": {"cudagraph_capture_sizes": SIZES}}
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}}
PROFILER = {"profiler": "torch", "torch_profiler_with_stack": False, "torch_profiler_use_gzip": True}
BATCHED = 8192
"""Tokens of a step: what `vllm serve` takes on this GPU."""
WARMING = 6
"""Engines that fill torch.compile's cache at a time."""
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "jenga": ("1", {"enable_prefix_caching": True}),
    f"jenga, pass_tokens {PASS_TOKENS}": (
        "1",
        {
            "enable_prefix_caching": True,
            "additional_config": {"jenga": {"checkpoints": {"pass_tokens": PASS_TOKENS}}},
        },
    ),
    "stock": ("0", {"enable_prefix_caching": True}),
    "stock, no caching": ("0", {"enable_prefix_caching": False}),
    "hybrid manager off": ("0", {"enable_prefix_caching": True, "disable_hybrid_kv_cache_manager": True}),
}


@dataclass(frozen=True)
class Load:
    """One model, its KV memory, and what it is asked."""

    model: str
    kv_gib: float
    workloads: tuple[tuple[Any, ...], ...]
    contenders: tuple[str, ...]
    longest: int = 8192
    running: int = 256
    """Most requests at a time; vLLM refuses more than it has blocks for states."""
    engine: dict[str, Any] = field(default_factory=dict)


HYBRID = ("jenga", "stock", f"jenga, pass_tokens {PASS_TOKENS}", "stock, no caching")
WINDOWS = ("jenga", "hybrid manager off", "stock")
# Prefixes of 480 tokens, for a few clients and for many, and of 4,096 as agents with many tools have them.
SHARING = (("agents", 160), ("agents", 320, 8, 480, 64), ("agents", 64, 8, 4096), ("conversations", 16))
ANSWERS = (("chat", 320), ("reasoning", 192))
LOADS = [
    Load("falcon-h1-34b", 4, (*ANSWERS, *SHARING), HYBRID, running=160),
    Load("llama-3.1-8b", 1.5, ANSWERS, ("jenga", "stock")),
    Load("gemma-3-27b", 6, (ANSWERS[0], ("documents", 32), SHARING[2]), WINDOWS, longest=16384),
    Load("qwen3-next-80b", 1.5, (*ANSWERS, *SHARING), HYBRID, running=160),
    Load("kimi-linear-48b", 2, (*ANSWERS, *SHARING), HYBRID, running=104),
    Load("nemotron-h-8b", 2.5, (*ANSWERS, *SHARING), HYBRID, running=100),
    Load("gpt-oss-120b", 1, (*ANSWERS, ("documents", 32)), WINDOWS, longest=16384),
]


def run(
    out: Path,
    chosen: list[str],
    who: list[str],
    repeats: int,
    compiled: bool,
    profile: bool,
    until_s: float,
    trace: Path | None = None,
    fill: bool = True,
) -> list[dict[str, Any]]:
    """All engines of the chosen models, one after the other; rows are printed and saved as they come.

    An engine that would start later than `until_s` seconds from now is left out, and said so.  With Mooncake's `trace`,
    its first requests are asked as well.  `fill`: torch.compile's cache is filled first, by several engines at a time.
    """
    folder = out / "work"
    rows: list[dict[str, Any]] = []
    processes.preload()
    begun = time.perf_counter()
    loads = LOADS if trace is None else [with_trace(load, trace) for load in LOADS]
    pairs = [
        (load, each)
        for load in loads
        for each in load.contenders
        if (not chosen or load.model in chosen) and (not who or each in who)
    ]
    for model in {load.model for load, _ in pairs}:
        models.make(model, folder, small=False)
    if compiled and fill:
        jobs = [job(folder, load, each, 0, compiled) for load, each in pairs if each in ("jenga", "stock")]
        for number, words in processes.run(jobs, WARMING):
            if words:
                print(f"warming up: {jobs[number].log}:\n{words}", flush=True)
        print(f"== {time.perf_counter() - begun:.0f} s: compiled", flush=True)
    for load, each in pairs:
        if time.perf_counter() - begun > until_s:
            print(f"left out: {load.model}, {each}", flush=True)
            continue
        asked = job(folder, load, each, repeats, compiled, profile)
        taken: Path = asked.arguments[1]
        taken.unlink(missing_ok=True)
        ((_, words),) = processes.run([asked])
        result: dict[str, Any] = json.loads(taken.read_text()) if taken.exists() else {}
        rows.append({"model": load.model, "contender": each, "kv_gib": load.kv_gib, **result})
        if words:
            rows[-1]["failed"] = words
        (out / "throughput.json").write_text(json.dumps(rows) + "\n")
        show(rows[-1], time.perf_counter() - begun)
    return rows


def job(folder: Path, load: Load, who: str, repeats: int, compiled: bool, profile: bool = False) -> processes.Job:
    """One engine; without repeats it only starts."""
    jenga, engine = CONTENDERS[who]
    scratch = folder / f"{load.model}-{who.replace(', ', '-').replace(' ', '-')}"
    given, taken, log = (Path(f"{scratch}.{suffix}") for suffix in ("spec.json", "json", "log"))
    spec = {
        "model": str(folder / load.model),
        "repeats": repeats,
        "profile": profile,
        "workloads": [w for w in load.workloads if asks(engine, w)] if repeats else [],
        "engine": {
            **models.RANDOM,
            "max_model_len": load.longest,
            "max_num_seqs": load.running,
            "max_num_batched_tokens": BATCHED,
            "gpu_memory_utilization": 0.9 if repeats else 0.1,
            "kv_cache_memory_bytes": int(load.kv_gib * GIB),
            **(COMPILED if compiled else GRAPHS),
            **({"profiler_config": PROFILER | {"torch_profiler_dir": str(scratch)}} if profile else {}),
            **models.MODELS[load.model].engine,
            **load.engine,
            **engine,
        },
    }
    given.write_text(json.dumps(spec))
    return processes.Job(serve.run, (given, taken), {"JENGA": jenga}, log, LIMIT_S)


def with_trace(load: Load, trace: Path, requests: int = 48) -> Load:
    """The load with the first requests of a trace that fit."""
    return replace(load, workloads=(*load.workloads, ("mooncake", requests, str(trace), load.longest)))


def asks(engine: dict[str, Any], workload: tuple[Any, ...]) -> bool:
    """Whether an engine is asked this: a yardstick for capacity is not asked about shared prefixes."""
    yardstick = not engine["enable_prefix_caching"] or "disable_hybrid_kv_cache_manager" in engine
    return not yardstick or workload[0] in ("chat", "reasoning", "documents")


def show(row: dict[str, Any], elapsed: float) -> None:
    """One engine's figures, one line per run."""
    print(f"== {elapsed:.0f} s {row['model']} {row['contender']}: start {row.get('start_s', 0):.0f} s", flush=True)
    for r in row.get("runs", ()):
        print(
            f"{r['workload']:28s} {r['seconds']:6.1f} s {r['steps']} steps {r['said_per_s']:8,.0f} tokens/s"
            f" resident {r['resident_mean']}"
            f" (most {r['resident_most']}) preempted {r['preemptions']} cached {r['cached_tokens']:,} of"
            f" {r['possible_tokens']:,} TTFT {r['ttft_s']['p50']:.3f}/{r['ttft_s']['p99']:.3f}"
            f" TPOT {1e3 * r['tpot_s']['p50']:.1f}/{1e3 * r['tpot_s']['p99']:.1f} ms",
            flush=True,
        )
    if "failed" in row:
        print(row["failed"], flush=True)
