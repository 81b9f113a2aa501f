"""Run one engine over seeded prompts and write its tokens and books as JSON.

A process of its own per run, since the plugin is installed per process: ``JENGA=0|1 python engine_run.py SPEC.json``.
The spec names the model, engine arguments, prompts (token ids) and rounds; see `harness.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind"
)
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def overlap_groups() -> None:
    """Negative control: let the last group's pages lie half a page apart, over each other and over other groups'."""
    from dataclasses import replace

    from jenga import grouping
    from jenga.vllm_plugin import planning

    def choose(*asked: Any) -> grouping.Grouping:
        good = grouping.choose_grouping(*asked)
        *kept, last = good.layout.groups
        return replace(good, layout=replace(good.layout, groups=(*kept, replace(last, stride=last.stride // 2))))

    setattr(planning, "choose_grouping", choose)  # noqa: B010


def geometry(worker: Any) -> list[Any]:
    """A worker's memory plan, and where each of its layers lies in its buffer (bytes)."""
    config = worker.model_runner.kv_cache_config
    tensors = [(t.layers, t.offset, t.layer_stride, t.block_stride, t.size) for t in config.kv_cache_tensors]
    return [type(config).__name__, config.num_blocks, tensors]


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    if spec["engine"].get("tensor_parallel_size", 1) > 1:  # in a network namespace of its own, see `harness.run`
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `geometry` is sent to the workers
    import torch
    from vllm import LLM, SamplingParams

    if os.environ["JENGA"] == "0":  # or stock cannot run Mamba-2 with prefix caching on a CPU at all
        from jenga.vllm_plugin.cpu_fixes import disable_mamba2_prefill_checkpoints

        disable_mamba2_prefill_checkpoints()

    if spec.get("overlap"):
        overlap_groups()
    if spec.get("leave_out_copies"):
        from tests.vllm_plugin.trace import leave_out_copies

        left_out = leave_out_copies()
    llm = LLM(
        spec["model"],
        skip_tokenizer_init="melodies" not in spec,  # Whisper wants its tokenizer for the audio
        enforce_eager=True,
        disable_log_stats=False,
        **spec["engine"],
    )
    core = llm.llm_engine.engine_core.engine_core
    manager = core.scheduler.kv_cache_manager
    jenga = type(manager.coordinator).__module__.startswith("jenga.")
    if "cuts" in spec:
        from tests.vllm_plugin.trace import impose_cuts

        impose_cuts(core.scheduler, spec["cuts"])
    if spec.get("row_by_row"):
        from tests.vllm_plugin.trace import row_by_row

        row_by_row(core.model_executor.driver_worker.worker.model_runner.model)
    recorder = None
    if "trace" in spec:
        from tests.vllm_plugin.trace import Recorder

        recorder = Recorder(core.model_executor.driver_worker.worker.model_runner, spec["trace"].get("force"))
    checks = peak_running = 0
    if jenga and spec.get("check"):
        schedule = core.scheduler.schedule

        def checked_schedule(*args: Any, **kwargs: Any) -> Any:
            nonlocal checks, peak_running
            output = schedule(*args, **kwargs)
            manager.coordinator.check()
            checks += 1
            peak_running = max(peak_running, len(core.scheduler.running))
            return output

        core.scheduler.schedule = checked_schedule
    wanted = spec["max_tokens"]
    sampling = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in (wanted if isinstance(wanted, list) else [wanted] * len(spec["prompts"]))
    ]
    asked: list[Any] = [{"prompt_token_ids": p} for p in spec["prompts"]]
    if "melodies" in spec:
        from jenga.demo import whisper

        asked = [
            {
                "encoder_prompt": {
                    "prompt": "",
                    "multi_modal_data": {"audio": (whisper.melody(seed), whisper.RATE)},
                },
                "decoder_prompt": prompt,
            }
            for seed, prompt in zip(spec["melodies"], asked, strict=True)
        ]
    tokens, cached = [], []
    for _ in range(spec.get("rounds", 1)):
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        tokens.append([list(o.outputs[0].token_ids) for o in outputs])
        cached.append([o.num_cached_tokens for o in outputs])
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result: dict[str, Any] = {
        "tokens": tokens,
        "cached": cached,
        "jenga": jenga,
        "preemptions": counters["vllm:num_preemptions"],
        "num_blocks": manager.kv_cache_config.num_blocks,
        "kv_bytes": manager.kv_cache_config.kv_cache_tensors[0].size,
        "managed": [type(g.kv_cache_spec).__name__ for g in manager.kv_cache_config.kv_cache_groups],
        "groups": [len(g.layer_names) for g in manager.kv_cache_config.kv_cache_groups],
        "checks": checks,
        "peak_running": peak_running,
    }
    if spec["engine"].get("tensor_parallel_size", 1) > 1:
        result["geometries"] = llm.collective_rpc(geometry)
    if jenga:
        coordinator = manager.coordinator
        coordinator.check()
        result["ratios"] = list(coordinator.kv_cache_config.ratios)
        result["memory"] = core.jenga_memory()
        result["evicted"] = list(coordinator.allocator.counters().evicted_pages)
        result["live_after"] = sum(g.live for g in coordinator.allocator.usage().groups)
        result["reset"] = manager.reset_prefix_cache()
        result["free_after_reset"] = coordinator.allocator.usage().free
        coordinator.check()
    if recorder is not None:
        result["lives"] = {who: [asdict(life) for life in lives] for who, lives in recorder.lives.items()}
        torch.save(recorder.logits, Path(sys.argv[2]).with_suffix(".pt"))
    if spec.get("leave_out_copies"):
        result["left_out"] = left_out()
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
