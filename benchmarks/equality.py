"""Greedy tokens under Jenga's memory manager against stock vLLM, counted, on the CPU engine with the demo models.

For each model and number format: stock with ample memory is the reference; beside it Jenga with ample memory, and both
with memory for about two requests.  In float32 nothing may differ.  In bfloat16 prefix hits and preemptions
change where prefills are cut, and rounding then flips tokens: the row "stock, pressed" shows how many stock itself
flips.

    .venv/bin/python benchmarks/equality.py            # about 6 minutes on 2 cores
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from jenga.demo import make
from tests.vllm_plugin.harness import differing, prompts, recall_prompts, run

MODELS = {
    # model: (number formats, MiB pressed in float32)
    "gemma3-recall": (("float32", "bfloat16"), 2.3),
    "granite-hybrid": (("float32", "bfloat16"), 5.0),
    "qwen3-next": (("bfloat16",), 5.0),  # vLLM's CPU kernel for GDN takes bfloat16 only
}
AMPLE_MIB = 48.0
GENERATED, ROUNDS = 100, 2


def spec(model: Path, dtype: str, mebibytes: float, caching: bool) -> dict[str, Any]:
    """One run: two rounds of prompts that share prefixes, more than fit when memory is short."""
    asked = recall_prompts(model, 4, 40, GENERATED)[0] if model.name == "gemma3-recall" else prompts(12, 200)
    return {
        "model": str(model),
        "max_tokens": GENERATED,
        "rounds": ROUNDS,
        "check": True,
        "prompts": asked,
        "engine": {
            "dtype": dtype,
            "max_model_len": 320,
            "block_size": 32,
            "kv_cache_memory_bytes": int(mebibytes * 2**20 * (1 if dtype == "float32" else 0.5)),
            "enable_prefix_caching": caching,
            "max_num_batched_tokens": 200,
            "max_num_seqs": 8,
        },
    }


def main() -> None:
    console = Console()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan = [
            (model, dtype, who, pressed, caching)
            for model, (dtypes, _) in MODELS.items()
            for dtype in dtypes
            for who, pressed, caching in (
                ("stock", False, True),
                ("jenga", False, True),
                ("jenga", False, False),
                ("stock", True, True),
                ("jenga", True, True),
                ("jenga", True, False),
            )
        ]
        reference: dict[str, Any] = {}
        for model, dtype, who, pressed, caching in track(plan, "engines", console=console):
            path = make(model, folder)
            memory = MODELS[model][1] if pressed else AMPLE_MIB
            begun = time.perf_counter()
            result = run(folder, "run", spec(path, dtype, memory, caching), jenga=who == "jenga")
            if who == "stock" and not pressed:
                reference = result
            rows.append(
                {
                    "model": model,
                    "dtype": dtype,
                    "engine": who,
                    "memory": "pressed" if pressed else "ample",
                    "prefix caching": caching,
                    "KV MiB": result["kv_bytes"] / 2**20,
                    "preemptions": result["preemptions"],
                    "hit tokens": sum(map(sum, result["cached"])),
                    "sequences": sum(map(len, result["tokens"])),
                    "differ from stock, ample": differing(reference, result),
                    "steps checked": result["checks"],
                    "seconds": time.perf_counter() - begun,
                }
            )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    out = Path("results/equality.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    console.print(f"saved {out}")


if __name__ == "__main__":
    main()
