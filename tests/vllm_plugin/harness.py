"""Specs for `engine_run.py`, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
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
    folder: Path,
    name: str,
    spec: dict[str, Any],
    *,
    jenga: bool,
    timeout: float = 600,
    runner: Path = RUNNER,
    **env: str,
) -> dict[str, Any]:
    """One engine in a process of its own; its result, or its last words on failure."""
    folder.mkdir(parents=True, exist_ok=True)
    given, taken = folder / f"{name}.spec.json", folder / f"{name}.result.json"
    given.write_text(json.dumps(spec))
    taken.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(runner), str(given), str(taken)],
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


@dataclass(frozen=True)
class Audit:
    """A run whose states and logits were computed again by stock vLLM, from nothing and cut in the same places."""

    result: dict[str, Any]
    """The run."""
    lives: int
    """Times that a request was admitted or resumed."""
    resumed: int
    """How many of them took tokens from the prefix cache."""
    positions: int
    """Chunk ends and decode steps compared, each with the states of all layers and the logits."""
    unlike: int
    """How many of them differ in any bit."""


def audit(folder: Path, name: str, spec: dict[str, Any], *, jenga: bool) -> Audit:
    """Run `spec`, and compute every state of it again without cache or pressure on stock vLLM.

    Both multiply row by row (`trace.row_by_row`), so that the batch changes no rounding.
    """
    exact = {**spec, "trace": {}, "row_by_row": True}
    exact["engine"] = {**spec["engine"], "async_scheduling": False}
    ours = run(folder, name, exact, jenga=jenga)
    tokens = {
        str(number): [*prompt, *said]
        for number, (prompt, said) in enumerate(
            (prompt, said) for round_ in ours["tokens"] for prompt, said in zip(spec["prompts"], round_, strict=True)
        )
    }
    again = replays(ours["lives"], tokens)
    engine = {**exact["engine"], "enable_prefix_caching": False, "kv_cache_memory_bytes": 64 << 20}
    engine["max_num_batched_tokens"] = 16 * engine["max_model_len"]  # no cuts but those imposed
    numbered = {str(number): each for number, each in enumerate(again)}
    replayed = run(
        folder,
        f"{name}-again",
        {
            "model": spec["model"],
            "prompts": [each["prompt"] for each in again],
            "max_tokens": [len(each["force"]) for each in again],
            "engine": engine,
            "row_by_row": True,
            "cuts": {number: each["cuts"] for number, each in numbered.items()},
            "trace": {"force": {number: each["force"] for number, each in numbered.items()}},
        },
        jenga=False,
    )
    positions = unlike = 0
    for number, each in numbered.items():
        (life,) = replayed["lives"][number]
        assert life["cuts"] == each["cuts"], "the cuts were not imposed"
        positions += len(each["digests"])
        unlike += sum(life["digests"][end] != digest for end, digest in each["digests"].items())
    return Audit(
        ours, len(again), sum(life["hit"] > 0 for lives in ours["lives"].values() for life in lives), positions, unlike
    )


def replays(lives: dict[str, list[dict[str, Any]]], tokens: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One request per life that computes the same `tokens` in the same cuts.

    Up to the last chunk of several tokens it is a prompt; what follows was decoded, and is forced.
    """
    made = []
    for who, each in lives.items():
        for life in each:
            cuts = life["cuts"]
            prompt = max(b for a, b in zip([0, *cuts], cuts, strict=False) if b - a > 1)
            made.append(
                {
                    "cuts": cuts,
                    "digests": life["digests"],
                    "prompt": tokens[who][:prompt],
                    "force": tokens[who][prompt : cuts[-1] + 1],
                }
            )
    return made


def differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Sequences, over all rounds, whose tokens differ."""
    return sum(x != y for ra, rb in zip(a["tokens"], b["tokens"], strict=True) for x, y in zip(ra, rb, strict=True))
