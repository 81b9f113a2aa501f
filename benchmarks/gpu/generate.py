"""One engine over seeded prompts, told what to do by a file.

`JENGA=0` leaves vLLM's own memory manager in charge.  With `score`, the engine afterwards reads each named sequence
from nothing and says by how much every generated token's log-probability falls short of the best one's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(given: Path, taken: Path) -> None:
    """Generate, score, and write what came out."""
    spec: dict[str, Any] = json.loads(given.read_text())
    from vllm import LLM, SamplingParams

    if spec.get("overlap"):
        from tests.vllm_plugin.engine_run import overlap_groups

        overlap_groups()
    # Async scheduling needs the engine core in a process of its own, where its books cannot be looked at.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(spec["separate"]))
    begun = time.perf_counter()
    llm = LLM(spec["model"], disable_log_stats=False, **spec["engine"])
    started = time.perf_counter() - begun
    held = hold(llm, spec["hold_bytes"]) if spec.get("hold_bytes") else 0
    checks = [0]
    if not spec["separate"] and not spec.get("overlap"):
        check_every_step(llm, checks)
    sampling = SamplingParams(temperature=0, max_tokens=spec["max_tokens"], ignore_eos=True, detokenize=False)
    asked = inputs(spec["prompts"], spec.get("melodies"))
    tokens, cached = [], []
    for _ in range(spec["rounds"]):
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        tokens.append([list(o.outputs[0].token_ids) for o in outputs])
        cached.append(sum(o.num_cached_tokens or 0 for o in outputs))
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    memory = jenga_memory(llm)
    result: dict[str, Any] = {
        "jenga": memory is not None,
        "evicted": sum(memory["counters"]["evicted_pages"]) if memory else None,
        "tokens": tokens,
        "cached": cached,
        "preemptions": counters["vllm:num_preemptions"],
        "checks": checks[0],
        "start_s": started,
        "held_bytes": held,
    }
    if not spec["separate"]:
        result |= inside(llm)
    wait_for = [Path(p) for p in spec.get("score", ())]
    while not all(p.exists() or p.with_suffix(".failed").exists() for p in wait_for):
        time.sleep(0.5)
    result["short"] = {
        p.name.removesuffix(".json"): shortfalls(llm, spec, json.loads(p.read_text())["tokens"])
        for p in wait_for
        if p.exists()
    }
    if "score" in spec:
        result["short"]["stock"] = shortfalls(llm, spec, tokens)
    scratch = taken.with_suffix(".part")
    scratch.write_text(json.dumps(result))
    scratch.rename(taken)


def jenga_memory(llm: Any) -> dict[str, Any] | None:
    """The engine's own report; None if vLLM's memory manager is in charge."""
    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore, "jenga_memory"):
        return None
    client = llm.llm_engine.engine_core
    made: dict[str, Any] | None = (
        client.call_utility("jenga_memory") if hasattr(client, "call_utility") else client.engine_core.jenga_memory()
    )
    return made


def check_every_step(llm: Any, checks: list[int]) -> None:
    """Check the books of the whole pool after every scheduler step, if Jenga keeps them."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    coordinator = scheduler.kv_cache_manager.coordinator
    if not hasattr(coordinator, "check"):
        return
    schedule = scheduler.schedule

    def checked(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        coordinator.check()
        checks[0] += 1
        return output

    scheduler.schedule = checked


def inside(llm: Any) -> dict[str, Any]:
    """What an engine core in this process is made of."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    config = core.scheduler.kv_cache_manager.kv_cache_config
    return {
        "runner": type(runner).__module__,
        "backends": backends(runner),
        "groups": [
            [type(g.kv_cache_spec).__name__, len(g.layer_names), g.kv_cache_spec.block_size]
            for g in config.kv_cache_groups
        ],
        "ratios": list(getattr(config, "ratios", ())),
    }


def backends(runner: Any) -> list[str]:
    """Names of the attention back ends in use."""
    attention = getattr(runner, "attn_groups", ())
    return sorted({g.backend.get_name() for groups in attention for g in groups})


def inputs(prompts: list[list[int]], melodies: list[int] | None) -> list[Any]:
    """What vLLM is asked: prompts, each with the audio of its melody where the model listens."""
    asked: list[Any] = [{"prompt_token_ids": p} for p in prompts]
    if melodies is None:
        return asked
    from jenga.demo import whisper

    audio = [(whisper.melody(m), whisper.RATE) for m in melodies]
    return [
        {"encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": a}}, "decoder_prompt": p}
        for a, p in zip(audio, asked, strict=True)
    ]


def hold(llm: Any, wanted: int) -> int:
    """Take the first pages of the buffer away, so that every request's lie behind them; returns their bytes.

    Raises:
        RuntimeError: the pages that were granted are not the first ones.
    """
    coordinator = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator
    if not hasattr(coordinator, "allocator"):
        return 0
    layout, allocator = coordinator.kv_cache_config.layout, coordinator.allocator
    first, reserved = layout.groups[0], coordinator.allocator.reserved
    count = wanted // layout.large_page_bytes // first.parts
    coordinator.pools[0].get_new_blocks(count * first.ratio)
    behind = reserved + count * first.parts
    if None in (allocator.owner(large) for large in range(reserved, behind)):
        raise RuntimeError(f"the first {behind} large pages are not all held")
    return int(behind * layout.large_page_bytes)


def shortfalls(llm: Any, spec: dict[str, Any], rounds: list[list[list[int]]]) -> list[float]:
    """Nats by which each generated token is less likely than the best, read in one go after its own context."""
    from vllm import SamplingParams

    pairs = [(p, said) for tokens in rounds for p, said in zip(spec["prompts"], tokens, strict=True)]
    melodies = spec["melodies"] * len(rounds) if "melodies" in spec else None
    reading = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    outputs = llm.generate(inputs([p + said for p, said in pairs], melodies), reading, use_tqdm=False)
    short = []
    for output, (_, said) in zip(outputs, pairs, strict=True):
        # vLLM puts a start token before what a decoder beside an encoder is given.
        for position, token in enumerate(said, start=len(output.prompt_token_ids) - len(said)):
            choices = output.prompt_logprobs[position]
            short.append(max(c.logprob for c in choices.values()) - choices[token].logprob)
    return short


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
