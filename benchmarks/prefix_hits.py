"""Prompt tokens that prefix caching spares, and the time to the first token, on the CPU engine with the demo models.

The same requests, one after the other, to vLLM with Jenga, to stock vLLM with several flags, and to vLLM without its
hybrid manager; all have the same KV memory, and each runs in a process of its own.  "Possible" is what a cache that
forgets nothing and resumes at every block could spare: the longest prefix, in whole blocks of 32 tokens, that any
earlier request (answer included) has in common.

    .venv/bin/python benchmarks/prefix_hits.py            # about 15 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

BLOCK = 32
CONTENDERS: dict[str, tuple[bool, dict[str, Any]]] = {
    # name: (with Jenga, engine arguments)
    "Jenga": (True, {}),
    "stock": (False, {}),
    "stock, match unit 32": (False, {"prefix_match_unit": BLOCK}),
    "stock, keep all states": (False, {"prefix_cache_retention_interval": None}),
    "no hybrid manager": (False, {"disable_hybrid_kv_cache_manager": True}),
}
WORKLOADS = {
    "short system prompts": "6 system prompts of 160 tokens, 5 chat questions each, in turn",
    "system prompts": "6 system prompts of 480 tokens, 5 chat questions each, in turn",
    "plain prefixes": "6 prefixes of 480 tokens, nothing marks where they end",
    "conversations": "2 conversations of 20 turns in turn, each resent as chat clients do",
}
PREFIXES, SIGHTINGS, QUESTION, ANSWER, TURNS = 6, 5, 60, 40, 20


def words(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    """`count` seeded token ids that are not special."""
    return [rng.randrange(40, vocabulary) for _ in range(count)]


def requests(workload: str, special: dict[str, int], vocabulary: int) -> Iterator[tuple[int, list[int], bool]]:
    """(conversation, tokens to add, whether to go on from its last answer) of each request, in order."""
    rng = random.Random(7)
    ask = [special["<user>"], *words(rng, 1, vocabulary)]
    cue = [special["<end>"], special["<model>"]]
    if workload == "conversations":
        starts = [[special["<bos>"], special["<system>"], *words(rng, 476, vocabulary)] for _ in range(2)]
        for turn in range(TURNS):
            for conversation, start in enumerate(starts):
                new = [special["<end>"], *ask, *words(rng, QUESTION, vocabulary), *cue]
                yield conversation, (start if turn == 0 else []) + new, turn > 0
        return
    marked = workload != "plain prefixes"
    prefixes = [words(rng, 160 if workload.startswith("short") else 480, vocabulary) for _ in range(PREFIXES)]
    for _ in range(SIGHTINGS):
        for prefix in prefixes:
            if marked:
                head = [special["<bos>"], special["<system>"], *prefix[:-4], special["<end>"], special["<user>"]]
                yield -1, [*head, *words(rng, QUESTION, vocabulary), *cue], False
            else:
                yield -1, [*prefix, *words(rng, QUESTION + 4, vocabulary)], False


def serve(spec: dict[str, Any]) -> dict[str, Any]:
    """One contender's engine over all workloads (runs in a process of its own)."""
    from vllm import LLM, SamplingParams

    if not spec["jenga"]:  # or stock cannot run Mamba-2 with prefix caching on a CPU at all
        from jenga.vllm_plugin.cpu_fixes import disable_mamba2_prefill_checkpoints

        disable_mamba2_prefill_checkpoints()
    llm = LLM(spec["model"], enforce_eager=True, disable_log_stats=False, **spec["engine"])
    tokenizer = llm.get_tokenizer()
    special = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<bos>", "<end>", "<user>", "<model>", "<system>")}
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    results = {}
    for workload in spec["workloads"]:
        llm.reset_prefix_cache()
        history: dict[int, list[int]] = {}
        seen: list[list[int]] = []
        rows = []
        for conversation, new, resumes in requests(workload, special, min(len(tokenizer), 200)):
            prompt = (history[conversation] if resumes else []) + new
            output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
            whole = prompt + list(output.outputs[0].token_ids)
            history[conversation] = whole
            possible = max((common(prompt, earlier) for earlier in seen), default=0)
            seen.append(whole)
            rows.append(
                {
                    "prompt": len(prompt),
                    "cached": output.num_cached_tokens,
                    "possible": min(possible, len(prompt) - 1) // BLOCK * BLOCK,
                    "ttft_s": output.metrics.first_token_latency,
                }
            )
        results[workload] = rows
    coordinator = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator
    assert type(coordinator).__module__.startswith("jenga.") is spec["jenga"], (
        "the plugin was not in the state asked for"
    )
    return results


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def run(model: Path, name: str, mebibytes: float, folder: Path) -> dict[str, Any]:
    """One contender in a process of its own; {"error": ...} if its engine does not start."""
    jenga, flags = CONTENDERS[name]
    given, taken = folder / "spec.json", folder / "result.json"
    taken.unlink(missing_ok=True)
    engine = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": int(mebibytes * 2**20),
        "enable_prefix_caching": True,
        **flags,
    }
    given.write_text(json.dumps({"model": str(model), "jenga": jenga, "engine": engine, "workloads": list(WORKLOADS)}))
    env = {
        **os.environ,
        "JENGA": "1" if jenga else "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    done = subprocess.run(
        [sys.executable, __file__, "--serve", str(given), str(taken)],
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if done.returncode:
        return {"error": next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")}
    loaded: dict[str, Any] = json.loads(taken.read_text())
    return loaded


def summary(rows: list[dict[str, Any]]) -> tuple[int, int, int, float, float]:
    """Prompt tokens, spared, possible, and the median and 90th percentile of the time to the first token (ms)."""
    times = sorted(1000 * r["ttft_s"] for r in rows)
    totals = [sum(r[key] for r in rows) for key in ("prompt", "cached", "possible")]
    return totals[0], totals[1], totals[2], statistics.median(times), times[int(0.9 * len(times))]


def report(console: Console, results: dict[str, dict[str, Any]]) -> None:
    """Print one table for each workload."""
    for workload, meaning in WORKLOADS.items():
        table = Table(title=f"{workload}: {meaning}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(
            ("model", "engine", "tokens spared", "of possible", "recomputed", "TTFT p50 ms", "p90 ms")
        ):
            table.add_column(column, justify="right" if i > 1 else "left", no_wrap=True)
        for model, contenders in results.items():
            for name, result in contenders.items():
                if "error" in result:
                    table.add_row(model, name, "does not start", "", "", "", "")
                    continue
                prompt, cached, possible, p50, p90 = summary(result[workload])
                table.add_row(
                    model,
                    name,
                    f"{cached:,}",
                    f"{100 * cached / possible:.0f} %",
                    f"{prompt - cached:,}",
                    f"{p50:.1f}",
                    f"{p90:.1f}",
                )
        console.print(table)
    for model, contenders in results.items():
        for name, result in contenders.items():
            if "error" in result:
                console.print(f"{model}, {name}: {result['error']}", soft_wrap=True, highlight=False)


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--serve"]:
        Path(sys.argv[3]).write_text(json.dumps(serve(json.loads(Path(sys.argv[2]).read_text()))))
        return
    from jenga.demo import make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gemma3-recall,granite-hybrid,qwen3-next")
    parser.add_argument("--contenders", default=";".join(CONTENDERS), help="separated by semicolons")
    parser.add_argument("--mebibytes", type=float, default=64.0, help="KV memory of every engine")
    parser.add_argument("--json", type=Path, default=Path("results/prefix_hits.json"))
    options = parser.parse_args()
    console = Console(width=140)
    cases = [(m, c) for m in options.models.split(",") for c in options.contenders.split(";")]
    results: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for model, contender in track(cases, description="serving", console=console):
            path = make(model, Path(scratch))
            results.setdefault(model, {})[contender] = run(path, contender, options.mebibytes, Path(scratch))
    report(console, results)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    kept = {"minutes": (time.perf_counter() - start) / 60, "mebibytes": options.mebibytes, "results": results}
    options.json.write_text(json.dumps(kept, indent=None, separators=(",", ":")))
    console.print(f"wrote {options.json} after {kept['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
