"""Specs for `engine_run.py`, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Environment of an engine in a test, where nothing else is set."""

NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Makes network and process namespaces for a command."""

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


def melodies(count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts for the decoder of an encoder-decoder, and the seeds of the audio that goes with each."""
    return [[1, 2, 3, 4 + seed % 3] for seed in range(count)], list(range(count))


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
    # Workers of one engine talk over ports.
    alone = spec["engine"].get("tensor_parallel_size", 1) > 1
    done = subprocess.run(
        [*(NAMESPACE if alone else ()), sys.executable, str(runner), str(given), str(taken)],
        env={**ENGINE, **os.environ, "JENGA": "1" if jenga else "0", **env},
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
    admissions: int
    """Times that a request was admitted, or resumed after a preemption."""
    hits: int
    """How many of them took tokens from the prefix cache."""
    changed: int
    """Pages taken from the cache that did not hold what had been written into them."""
    mixed: int
    """Hits whose pages were computed with unlike cuts: what follows may round unlike any single computation."""
    compared: int
    """Sets of states (one per chunk and decode step) and of logits (one per sampled token), without mixed hits."""
    unlike: int
    """How many of them differ in any bit."""
    compared_mixed: int
    """The same after mixed hits."""
    unlike_mixed: int


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
    compared, unlike = Counter[bool](), Counter[bool]()
    for number, each in numbered.items():
        (life,) = replayed["lives"][number]
        assert life["cuts"] == each["cuts"], "the cuts were not imposed"
        mixed = each["life"]["mixed"]
        for what in ("states", "logits"):
            compared[mixed] += len(each["life"][what])
            unlike[mixed] += sum(life[what][end] != digest for end, digest in each["life"][what].items())
    lives = [life for each in ours["lives"].values() for life in each]
    return Audit(
        result=ours,
        admissions=len(lives),
        hits=sum(life["hit"] > 0 for life in lives),
        changed=sum(life["changed"] for life in lives),
        mixed=sum(life["mixed"] for life in lives),
        compared=compared[False],
        unlike=unlike[False],
        compared_mixed=compared[True],
        unlike_mixed=unlike[True],
    )


def replays(lives: dict[str, list[dict[str, Any]]], tokens: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One request per life, to compute the same `tokens` in the same cuts.

    Up to the last chunk of several tokens it is a prompt; what follows was decoded, and is forced.
    """
    made = []
    for who, each in lives.items():
        for life in each:
            cuts = life["cuts"]
            prompt = max(b for a, b in zip([0, *cuts], cuts, strict=False) if b - a > 1)
            forced = tokens[who][prompt : cuts[-1] + 1]
            made.append({"life": life, "cuts": cuts, "prompt": tokens[who][:prompt], "force": forced})
    return made


def differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Sequences, over all rounds, whose tokens differ."""
    return sum(x != y for ra, rb in zip(a["tokens"], b["tokens"], strict=True) for x, y in zip(ra, rb, strict=True))
