"""Greedy tokens under Jenga's memory manager against stock vLLM, counted, on the CPU engine with the demo models.

For each model and number format the reference is stock vLLM with ample memory, prefix caching and prefills of up to 200
tokens.  Eight settings vary memory, caching, the size of prefills (an odd 77) and
asynchronous scheduling, so that each pair of values occurs twice.  In float32 nothing may differ.  In bfloat16 other
cuts and batches round otherwise, so stock runs in the same eight settings: the yardstick (`states.py` tells rounding
from faults).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/equality.py    # 20 minutes on 4 busy cores
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from jenga.demo import make
from tests.vllm_plugin.harness import differing, melodies, prompts, recall_prompts, run

MODELS = {
    # model: (number formats, MiB pressed in float32)
    "gemma3-recall": (("float32",), 2.3),
    "gemma4": (("float32",), 2.3),
    "granite-hybrid": (("float32", "bfloat16"), 4.5),
    "qwen3-next": (("bfloat16",), 4.5),  # vLLM's CPU kernel for GDN takes bfloat16 only
    "whisper": (("float32",), 5.0),
}
AMPLE_MIB = 48.0
GENERATED, ROUNDS = 60, 2
CHUNK, ODD_CHUNK = 200, 77
ENGINES = 2


@dataclass(frozen=True)
class Setting:
    """What is varied."""

    pressed: bool
    caching: bool
    chunk: int
    asynchronous: bool


HALF = [
    Setting(pressed, caching, chunk, (pressed ^ caching ^ (chunk == CHUNK)))
    for pressed, caching, chunk in product((False, True), (True, False), (CHUNK, ODD_CHUNK))
]
"""Half of all sixteen; any two values occur together in two of them."""
ENCODER = [Setting(pressed, False, 512, asynchronous) for pressed, asynchronous in product((False, True), repeat=2)]
"""For an encoder-decoder vLLM neither caches prefixes nor cuts prefills."""


def settings(model: str) -> list[Setting]:
    """The settings of one model; the first is the reference."""
    return ENCODER if model == "whisper" else HALF


def spec(model: Path, dtype: str, setting: Setting) -> dict[str, Any]:
    """Two rounds of prompts that share prefixes, more than fit when memory is short."""
    made: dict[str, Any] = {}
    if model.name == "whisper":
        made["prompts"], made["melodies"] = melodies(12)
    elif model.name == "gemma3-recall":
        made["prompts"] = recall_prompts(model, 4, 40, GENERATED)[0]
    else:
        made["prompts"] = prompts(12, 200)
    mebibytes = MODELS[model.name][1] if setting.pressed else AMPLE_MIB
    return made | {
        "model": str(model),
        "max_tokens": GENERATED,
        "rounds": ROUNDS,
        "check": True,
        "engine": {
            "dtype": dtype,
            "max_model_len": 320,
            "block_size": 32,
            "kv_cache_memory_bytes": int(mebibytes * 2**20 * (1 if dtype == "float32" else 0.5)),
            "enable_prefix_caching": setting.caching,
            "max_num_batched_tokens": setting.chunk,
            "max_num_seqs": 8,
            "async_scheduling": setting.asynchronous,
        },
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console()
    begun = time.perf_counter()
    plan = [
        (model, dtype, setting, who)
        for model, (dtypes, _) in MODELS.items()
        for dtype in dtypes
        for setting in settings(model)
        for who in ("stock", "jenga")
        if who == "jenga" or setting == settings(model)[0] or rounds_otherwise(model, dtype)
    ]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(ENGINES) as engines:
        folder = Path(scratch)
        paths = {model: make(model, folder) for model in MODELS}
        running = {
            each: engines.submit(
                run, folder, f"run-{number}", spec(paths[each[0]], *each[1:3]), jenga=each[3] == "jenga"
            )
            for number, each in enumerate(plan)
        }
        done = {each: future.result() for each, future in track(running.items(), "engines", console=console)}
    rows = [row(done, each) for each in plan if each[3] == "jenga"]
    table = Table(*rows[0])
    for each in rows:
        table.add_row(*("" if v is None else str(v) for v in each.values()))
    console.print(table)
    out = Path("results/equality.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"saved {out}; {len(plan)} engines in {time.perf_counter() - begun:,.0f} s")


def rounds_otherwise(model: str, dtype: str) -> bool:
    """Whether stock differs from itself in other settings, so that it runs in all of them."""
    return dtype != "float32" or model == "whisper"


Run = tuple[str, str, Setting, str]


def row(done: dict[Run, dict[str, Any]], each: Run) -> dict[str, Any]:
    """One setting of one model: Jenga beside stock."""
    model, dtype, setting, _ = each
    ours = done[each]
    reference = done[model, dtype, settings(model)[0], "stock"]
    stock = done.get((model, dtype, setting, "stock"))
    if ours["live_after"] or ours["free_after_reset"] != ours["num_blocks"] - 1:
        raise RuntimeError(f"{model} {dtype} {setting}: pages leaked")
    return {
        "model": model,
        "dtype": dtype,
        **asdict(setting),
        "preemptions": int(ours["preemptions"]),
        "preemptions, stock": stock and int(stock["preemptions"]),
        "evicted pages": sum(ours["evicted"]),
        "hit tokens": hit_tokens(ours),
        "hit tokens, stock": stock and hit_tokens(stock),
        "steps checked": ours["checks"],
        "sequences": sum(map(len, ours["tokens"])),
        "differ": differing(reference, ours),
        "differ, stock": stock and differing(reference, stock),
        "differ from stock in this setting": stock and differing(stock, ours),
    }


def hit_tokens(result: dict[str, Any]) -> int:
    """Prompt tokens taken from the prefix cache."""
    return sum(map(sum, result["cached"]))


if __name__ == "__main__":
    main()
