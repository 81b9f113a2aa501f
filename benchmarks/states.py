"""Recurrent states and logits, bit by bit: is a difference from stock vLLM rounding, or a wrong page?

Rounding in bfloat16 depends on where prefills are cut and on the batch.  Here every state and every logit of a run is
computed again by stock vLLM, without prefix cache or pressure, cut in the same places, with weights multiplied row by
row in both.  What differs then in one bit is a fault of the memory manager.  A run whose state copies are left out in
one layer is the negative control.  The last rows count tokens, one request at a time: stock with the same cuts, and
with its own.

A hit whose attention pages and state were computed with unlike cuts ("mixed") rounds like no single computation; what
follows is counted apart.  Pages as long as the kernel's chunks leave its rounding alone, and so need no such exception.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/states.py    # 20 minutes on 4 busy cores
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from jenga.demo import make
from tests.vllm_plugin.harness import audit, differing, prompts, run

MODELS = ("qwen3-next", "granite-hybrid")
AMPLE_MIB, PRESSED_MIB = 48.0, 3.5
REQUESTS, LENGTH, GENERATED, ROUNDS = 12, 200, 60, 2
BLOCK = 32
KERNEL_CHUNK = 64
"""Tokens that the kernels of GDN compute at once."""


def spec(model: Path, mebibytes: float = AMPLE_MIB, *, caching: bool = True, **options: Any) -> dict[str, Any]:
    """Two rounds of prompts that share prefixes, in bfloat16."""
    engine = {
        "dtype": "bfloat16",
        "max_model_len": 320,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": int(mebibytes * 2**20),
        "enable_prefix_caching": caching,
        "max_num_batched_tokens": 200,
        "max_num_seqs": 8,
        "async_scheduling": False,
        **options.pop("engine", {}),
    }
    return {
        "model": str(model),
        "max_tokens": GENERATED,
        "rounds": ROUNDS,
        "check": True,
        "prompts": prompts(REQUESTS, LENGTH),
        "engine": engine,
        **options,
    }


def main() -> None:
    console = Console()
    rows: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    plan = [
        (model, *each)
        for model in MODELS
        for each in (
            ("jenga", AMPLE_MIB, BLOCK, False),
            ("jenga", PRESSED_MIB, BLOCK, False),
            ("jenga", AMPLE_MIB, KERNEL_CHUNK, False),
            ("stock", PRESSED_MIB, BLOCK, False),
            ("jenga", AMPLE_MIB, BLOCK, True),
        )
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for model, who, mebibytes, page, fault in track(plan, "states", console=console):
            options: dict[str, Any] = {"leave_out_copies": True} if fault else {}
            wanted = spec(make(model, folder), mebibytes, engine={"block_size": page}, **options)
            done = audit(folder, "run", wanted, jenga=who == "jenga")
            rows.append(
                {
                    "model": model,
                    "engine": who + (", copies left out" if fault else ""),
                    "memory": "pressed" if mebibytes < AMPLE_MIB else "ample",
                    "tokens/page": page,
                    "preemptions": int(done.result["preemptions"]),
                    "hit tokens": sum(map(sum, done.result["cached"])),
                    "admissions": done.admissions,
                    "hits": done.hits,
                    "changed pages": done.changed,
                    "compared": done.compared,
                    "unlike": done.unlike,
                    "mixed hits": done.mixed,
                    "compared after them": done.compared_mixed,
                    "unlike after them": done.unlike_mixed,
                }
            )
        for model in track(MODELS, "tokens", console=console):
            tokens.append(one_at_a_time(folder, make(model, folder)))
    for made in (rows, tokens):
        table = Table(*made[0])
        for row in made:
            table.add_row(*map(str, row.values()))
        console.print(table)
    out = Path("results/states.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"states": rows, "tokens": tokens}, indent=1) + "\n")
    console.print(f"saved {out}")


def one_at_a_time(folder: Path, model: Path) -> dict[str, Any]:
    """Sequences that differ when only the cuts do, and when they do not; kernels as they are, a batch of one."""
    alone = {"max_num_seqs": 1}
    ours = run(folder, "ours", spec(model, engine=alone, trace={}), jenga=True)
    cuts = {who: lives[0]["cuts"] for who, lives in ours["lives"].items()}
    own = run(folder, "own", spec(model, caching=False, engine=alone), jenga=False)
    same = run(folder, "same", spec(model, caching=False, engine=alone, cuts=cuts), jenga=False)
    aligned = run(folder, "aligned", spec(model, engine={**alone, "block_size": KERNEL_CHUNK}), jenga=True)
    return {
        "model": model.name,
        "sequences": REQUESTS * ROUNDS,
        "Jenga / stock, Jenga's cuts": differing(ours, same),
        "Jenga / stock, own cuts": differing(ours, own),
        "stock, Jenga's cuts / own cuts": differing(same, own),
        f"Jenga with pages of {KERNEL_CHUNK} / stock, own cuts": differing(aligned, own),
    }


if __name__ == "__main__":
    main()
