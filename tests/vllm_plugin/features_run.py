"""What else a request can ask of an engine, beside plain greedy text; answers as JSON.

``JENGA=0|1 python features_run.py SPEC.json RESULT.json``; a process of its own, like `engine_run.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


STEPS = 8
"""Steps before a sleep: the requests are past their prompts and not done."""


def doze(llm: Any, core: Any, prompts: list[list[int]], level: int, sampling: Any) -> list[list[int]]:
    """Answers of requests that are kept while the engine sleeps in their midst.

    vLLM's CPU worker gives no memory back, so that is played here: from level 1 on, pages wake up with other contents.
    """
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{level}-{number}", {"prompt_token_ids": prompt}, sampling)
    done = [output for _ in range(STEPS) for output in engine.step()]
    engine.sleep(level, mode="keep")
    if level:
        caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
        for tensor in (t for cache in caches for t in (cache if isinstance(cache, list | tuple) else [cache])):
            tensor.fill_(7.0)
    engine.wake_up(None if level else ["scheduling"])
    while engine.has_unfinished_requests():
        done += engine.step()
    tokens = {output.request_id: list(output.outputs[0].token_ids) for output in done}
    return [tokens[f"{level}-{number}"] for number in range(len(prompts))]


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if os.environ["JENGA"] == "0":  # or stock cannot run Mamba-2 with prefix caching on a CPU at all
        from jenga.vllm_plugin.cpu_fixes import disable_mamba2_prefill_checkpoints

        disable_mamba2_prefill_checkpoints()
    llm = LLM(spec["model"], enforce_eager=True, scheduling_policy="priority", **spec["engine"])
    core = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    coordinator = scheduler.kv_cache_manager.coordinator
    prompts = spec["prompts"]
    plain = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}

    def ask(given: list[Any], priority: list[int] | None = None, **sampling: Any) -> list[Any]:
        asked = [g if isinstance(g, dict) else {"prompt_token_ids": g} for g in given]
        return list(llm.generate(asked, SamplingParams(**sampling), use_tqdm=False, priority=priority))

    def text(outputs: list[Any]) -> list[list[list[int]]]:
        return [[list(o.token_ids) for o in output.outputs] for output in outputs]

    result: dict[str, Any] = {"jenga": type(coordinator).__module__.startswith("jenga.")}
    result["priority"] = text(ask(prompts, priority=list(range(len(prompts), 0, -1)), **plain))
    scored = ask(prompts[:2], **plain, prompt_logprobs=1)
    result["prompt_logprobs"] = [
        [
            None if p is None else round(p[t].logprob, 4)
            for p, t in zip(o.prompt_logprobs, o.prompt_token_ids, strict=True)
        ]
        for o in scored
    ]
    # Unseeded: vLLM's CPU back end cannot take a seeded sampler back after a partial prefill.
    samples = text(ask(prompts[:2], n=3, temperature=1.0, max_tokens=8, ignore_eos=True))
    result["several"] = [[len(tokens) for tokens in output] for output in samples]
    result["choice"] = [
        o.outputs[0].text
        for o in ask(
            prompts[:3], temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["12", "7"])
        )
    ]
    cached = []
    for salt in ("a", "b", "a"):
        (output,) = ask([{"prompt_token_ids": prompts[3], "cache_salt": salt}], **plain)
        cached.append(output.num_cached_tokens)
    result["salted_hits"] = cached
    result["slept"] = [doze(llm, core, prompts[:2], level, SamplingParams(**plain)) for level in (0, 1, 2)]
    llm.llm_engine.add_request("running", {"prompt_token_ids": prompts[0]}, SamplingParams(**plain))
    llm.llm_engine.step()
    result["reset_while_running"] = llm.reset_prefix_cache()
    llm.llm_engine.abort_request(["running"])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    result["reset_when_idle"] = llm.reset_prefix_cache()
    result["hit_after_reset"] = ask(prompts[:1], **plain)[0].num_cached_tokens
    if result["jenga"]:
        coordinator.check()
        result["live_after"] = sum(g.live for g in coordinator.allocator.usage().groups)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
