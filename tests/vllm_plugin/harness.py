"""Specs for `engine_run.py`, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).with_name("engine_run.py")


def prompts(count: int, length: int, *, shared: int = 3, seed: int = 1, vocabulary: int = 200) -> list[list[int]]:
    """Seeded prompts of up to `length` tokens; each starts with one of `shared` common prefixes of half of that."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(5, vocabulary) for _ in range(length // 2)] for _ in range(shared)]
    return [
        prefixes[i % shared] + [rng.randrange(5, vocabulary) for _ in range(rng.randrange(8, length // 2))]
        for i in range(count)
    ]


def recall_prompts(model: Path, tables: int, pairs: int, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Questions to the recall model about a few long tables, and the token ids of their right answers.

    Each asks to recite the table from some key on, for at least `length` tokens; questions about one table share it.
    """
    from transformers import AutoTokenizer

    from jenga.demo import recall

    tokenizer = AutoTokenizer.from_pretrained(model)
    given, wanted = [], []
    for start in (0.0, 0.1, 0.2):
        for seed in range(tables):
            asked = recall.table(seed, pairs).ask(int(start * pairs) + seed, "!")
            given.append(list(tokenizer.apply_chat_template(asked.messages, add_generation_prompt=True)["input_ids"]))
            wanted.append(list(tokenizer.encode(asked.answer, add_special_tokens=False))[:length])
    return given, wanted


def run(
    folder: Path, name: str, spec: dict[str, Any], *, jenga: bool, timeout: float = 600, **env: str
) -> dict[str, Any]:
    """One engine in a process of its own; its result, or its last words on failure."""
    folder.mkdir(parents=True, exist_ok=True)
    given, taken = folder / f"{name}.spec.json", folder / f"{name}.result.json"
    given.write_text(json.dumps(spec))
    taken.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(given), str(taken)],
        env={**os.environ, "JENGA": "1" if jenga else "0", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"engine run {name} failed ({done.returncode}):\n{done.stderr[-6000:]}")
    result: dict[str, Any] = json.loads(taken.read_text())
    assert result["jenga"] is jenga, "the plugin was not in the state asked for"
    return result


def differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Sequences, over all rounds, whose tokens differ."""
    return sum(x != y for ra, rb in zip(a["tokens"], b["tokens"], strict=True) for x, y in zip(ra, rb, strict=True))
