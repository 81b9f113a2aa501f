"""The same tokens on CUDA: Jenga's memory manager against stock vLLM, counted.

Every case runs these engines over the same prompts: stock with ample memory and without prefix caching; stock recut,
which takes other steps (smaller batches, shorter cuts); Jenga as stock, so that both take the same steps; Jenga
pressed, with prefix caching, twice over the prompts; and a negative control, pressed, whose last group's pages overlap
others.  In bfloat16 other batches and cuts round otherwise, and near ties then fall the other way.  So stock also reads
what each engine said, from nothing, and gives each token's log-probability against the best one's: a token that
follows from wrong pages falls short by far more.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import generate, models, processes

GRAPHS = {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    }
}
"""CUDA graphs for decodes, without torch.compile (whose minutes of start-up would show nothing here)."""
CONTENDERS = ("stock", "recut", "jenga", "pressed", "overlapping")
STOCK = ("stock", "recut")
LIMIT_S = 240
LEAST_SHORT = 0.1
"""Nats that a token may fall short of the best one in any case: ties in bfloat16."""
LONERS = 0.001
"""Part of the tokens of a model with experts that may fall short by more than that, and by `MOST_SHORT` at most: a tie
between experts changes a whole layer.  Wrong pages spoil what follows as well."""
MOST_SHORT = 3.0
"""Nats."""
EXPERTS = ("gpt-oss-120b", "qwen3-next-80b", "kimi-linear-48b")


@dataclass(frozen=True)
class Case:
    """A model and how the engine runs it."""

    model: str
    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    press: float = 1.0
    """Factor on the pressed KV memory."""
    hold: int = 0
    """Bytes at the buffer's start that Jenga's requests must not use."""
    control: bool = False
    """Whether the negative control runs too."""
    separate: bool = False
    """Whether the engine core runs in a process of its own, as when serving (async scheduling needs that)."""

    @property
    def others(self) -> tuple[str, ...]:
        """The engines that stock is compared with."""
        return ("recut", "jenga", "pressed", *(("overlapping",) if self.control else ()))


V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
EAGER = {"enforce_eager": True}
TRITON = {"attention_backend": "TRITON_ATTN"}
FAR = 9 << 30
"""Bytes: offsets beyond 2^31 elements of 4 bytes."""


def _far(model: str) -> Case:
    return Case(model, "V2, pages behind 9 GiB", GRAPHS, V2, hold=FAR)


LLAMA, *HYBRIDS = [m for m in models.MODELS if m != models.WHISPER]
_V1 = [Case(m, "V1, eager", EAGER, V1) for m in HYBRIDS]
# Cases with much memory stand apart: several engines share the GPU.
CASES = [
    *(Case(m, "V2, graphs", GRAPHS, V2, control=True) for m in HYBRIDS),
    _far("falcon-h1-34b"),
    Case(LLAMA, "V2, graphs", GRAPHS, V2),
    *_V1[:3],
    _far("qwen3-next-80b"),
    *_V1[3:],
    _far("gemma-3-27b"),
    Case("gemma-3-27b", "V2, Triton attention", GRAPHS | TRITON, V2),
    Case("gemma-3-27b", "V2, fp8 KV", GRAPHS | {"kv_cache_dtype": "fp8"}, V2, 0.5),
    Case("qwen3-next-80b", "V2, Triton attention", GRAPHS | TRITON, V2),
    Case(models.WHISPER, "V1, eager, audio", EAGER, V1),
    _far("kimi-linear-48b"),
    *(
        Case(m, "V2, graphs, async scheduling", GRAPHS | {"async_scheduling": True}, V2, separate=True)
        for m in ("gemma-3-27b", "falcon-h1-34b", "qwen3-next-80b")
    ),
    Case(models.WHISPER, "V2, graphs, audio", GRAPHS, V2),
]


def prompts(count: int = 24, shared: int = 3, seed: int = 5) -> list[list[int]]:
    """Seeded prompts of 120 to 400 tokens; each starts with one of `shared` prefixes of 96 to 160 tokens."""
    rng = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [rng.randrange(5, models.VOCABULARY) for _ in range(rng.randrange(low, high))]

    prefixes = [some(96, 160) for _ in range(shared)]
    return [prefixes[i % shared] + some(24, 240) for i in range(count)]


def melodies(count: int = 24) -> dict[str, Any]:
    """Audio for the encoder, by its seed, and what the decoder has said already."""
    return {"melodies": list(range(count)), "prompts": [[1, 2, 3, 4 + n % 3] for n in range(count)]}


def spec(case: Case, contender: str, folder: Path, pressed_bytes: int) -> dict[str, Any]:
    """What `generate.py` is told."""
    pressed = contender in ("pressed", "overlapping")
    model = models.MODELS[case.model]
    hears = case.model == models.WHISPER
    kv_bytes = int(pressed_bytes * case.press) if pressed else 1 << 30
    hold = case.hold if contender not in STOCK else 0
    return {
        "model": str(folder / f"{case.model}-small"),
        **(melodies() if hears else {"prompts": prompts()}),
        "hold_bytes": hold,
        "max_tokens": 64,
        "rounds": 2 if pressed else 1,
        "separate": case.separate,
        "overlap": contender == "overlapping",
        "engine": {
            **models.RANDOM,
            "skip_tokenizer_init": True,
            "max_model_len": model.context,
            "max_num_seqs": 5 if contender == "recut" else 16,
            "max_num_batched_tokens": 200 if contender == "recut" and not hears else 384,
            "gpu_memory_utilization": 0.08,
            "kv_cache_memory_bytes": kv_bytes + hold,
            "enable_prefix_caching": pressed and not hears,
            "seed": 0,
            **model.engine,
            **case.engine,
        },
    }


def pressed_bytes(model: str) -> int:
    """KV memory that a few of the running requests need, from the small model's geometry."""
    configure = models.MODELS[model].config
    if configure is None:
        return 5 << 20  # the demo model's own
    config = configure(True)
    layers = config["num_hidden_layers"]
    kv = 2 * 2 * config.get("num_key_value_heads", 8) * config["head_dim"] * layers * 640
    state = 0
    if "mamba_num_heads" in config:
        state = config["mamba_num_heads"] * config["mamba_head_dim"] * config["ssm_state_size"] * 4 * 3
    elif "mamba_n_heads" in config:
        state = config["mamba_n_heads"] * config["mamba_d_head"] * config["mamba_d_state"] * 4 * layers
    elif "linear_num_value_heads" in config:
        state = config["linear_num_value_heads"] * 128 * 128 * 4 * layers
    elif "linear_attn_config" in config:
        state, kv = 8 * 128 * 128 * 4 * layers, 2 * 576 * 640 * layers
    return 3 * kv + 8 * state


def job(case: Case, contender: str, folder: Path, scratch: Path) -> processes.Job:
    """One engine; it leaves `scratch`/CONTENDER.json."""
    given, taken = scratch / f"{contender}.spec.json", scratch / f"{contender}.json"
    asked = spec(case, contender, folder, pressed_bytes(case.model))
    if contender == "stock":
        asked["score"] = [str(scratch / f"{other}.json") for other in case.others]
    given.write_text(json.dumps(asked))
    environment = case.environment | {"JENGA": "0" if contender in STOCK else "1"}
    return processes.Job(generate.main, (given, taken), environment, taken.with_suffix(".log"), LIMIT_S)


def run(out: Path, chosen: list[str], named: list[str], engines: int) -> list[dict[str, Any]]:
    """All cases whose model is chosen and whose name has one of `named` in it; rows are printed and saved as they come.

    Raises:
        RuntimeError: not even the first engine starts; its last words.
    """
    folder = out / "work"
    processes.preload()
    cases = [
        c for c in CASES if (not chosen or c.model in chosen) and (not named or any(part in c.name for part in named))
    ]
    for name in {c.model for c in cases}:
        models.make(name, folder, small=True)
    work: list[tuple[Case, Path, str]] = []
    for case in cases:
        scratch = folder / f"{case.model} {case.name}".replace(", ", "-").replace(" ", "-")
        shutil.rmtree(scratch, ignore_errors=True)  # stock would read what an earlier run left
        scratch.mkdir(parents=True)
        # Stock reads what the others said, so it goes last.
        work += [(case, scratch, who) for who in (*case.others, "stock")]
    rows: list[dict[str, Any]] = []
    ended: Counter[Path] = Counter()
    jobs = [job(case, who, folder, scratch) for case, scratch, who in work]
    for first, words in processes.run(jobs[:1]):
        if words:
            raise RuntimeError(f"vLLM does not start here:\n{jobs[first].log}:\n{words}")
    for number, words in processes.run(jobs, engines):
        case, scratch, who = work[number]
        if words:
            (scratch / f"{who}.failed").write_text(words)
        ended[scratch] += 1
        if ended[scratch] == len(case.others) + 1:
            rows.append(row(case, scratch))
            print(json.dumps(rows[-1]), flush=True)
            (out / "correctness.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def row(case: Case, scratch: Path) -> dict[str, Any]:
    """What one case showed."""
    results = {w: json.loads(p.read_text()) for w in CONTENDERS if (p := scratch / f"{w}.json").exists()}
    failed = {w: p.read_text() for w in CONTENDERS if (p := scratch / f"{w}.failed").exists()}
    made: dict[str, Any] = {"model": case.model, "case": case.name, "failed": failed}
    stock = results.get("stock")
    if stock is None:
        return made
    made |= {k: stock[k] for k in ("runner", "backends", "groups") if k in stock}
    usual = max(max(stock["short"][who]) for who in STOCK if who in results)
    for who, result in results.items():
        short = stock["short"][who]
        made[who] = {
            "differ": sum(a != b for said in result["tokens"] for a, b in zip(said, stock["tokens"][0], strict=True)),
            "of": sum(map(len, result["tokens"])),
            "distinct": len({t for said in result["tokens"][0] for t in said}),
            "not best": sum(s > 0 for s in short),
            "tokens": len(short),
            "mean short": statistics.fmean(short),
            "most short": max(short),
            "beyond": sum(each > max(LEAST_SHORT, 2 * usual) for each in short),
            "preemptions": result["preemptions"],
            "cached": result["cached"],
            "held GiB": round(result["held_bytes"] / 2**30, 1),
            "start s": round(result["start_s"], 1),
            **(
                {k: result[k] for k in ("checks", "ratios", "evicted", "groups") if k in result}
                if result["jenga"]
                else {}
            ),
        }
    return made


def faults(made: dict[str, Any]) -> list[str]:
    """What is wrong in a row, in words."""
    found = [f"{who} failed" for who in made["failed"]]
    if found or "stock" not in made:
        return found or ["stock said nothing"]
    usual = max(made[who]["most short"] for who in STOCK if who in made)
    limit = max(LEAST_SHORT, 2 * usual)
    loners = LONERS if made["model"] in EXPERTS else 0.0
    found += [
        f"{who}: {made[who]['beyond']} tokens fall short by more than {limit:.2f} nats, twice stock's most, one by"
        f" {made[who]['most short']:.2f}"
        for who in ("jenga", "pressed")
        if made[who]["beyond"] > loners * made[who]["tokens"] or made[who]["most short"] > max(limit, MOST_SHORT)
    ]
    control = made.get("overlapping")
    if control is not None and control["beyond"] <= LONERS * control["tokens"]:
        found.append("overlapping pages went unnoticed, so that the case shows nothing")
    return found


def timed(out: Path, chosen: list[str], named: list[str], engines: int) -> int:
    """`run`, and how long it took; the number of cases with faults."""
    begun = time.perf_counter()
    rows = run(out, chosen, named, engines)
    wrong = {f"{made['model']}, {made['case']}": found for made in rows if (found := faults(made))}
    for case, found in wrong.items():
        print(f"{case}: {'; '.join(found)}", flush=True)
    print(f"correctness took {time.perf_counter() - begun:,.0f} s; {len(wrong)} cases with faults", flush=True)
    return len(wrong)
