"""Run one stand-alone engine under memory pressure, and check its report between steps.

``python report_run.py SPEC.json ANSWER.json``; the spec names model, engine arguments, prompts and tokens to generate.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    JENGA="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def walked(coordinator: Any, scheduler: Any) -> list[tuple[int, int, int]]:
    """Held and needed pages and empty token places by group, by a walk over every block of every request."""
    found = []
    for manager, place in zip(coordinator.single_type_managers, coordinator.kv_cache_config.layout.groups, strict=True):
        policy, size = place.group.policy, place.group.page_tokens
        needed: set[int] = set()
        held: set[int] = set()
        empty = 0
        for request in scheduler.requests.values():
            tokens = request.num_computed_tokens
            for position, block in enumerate(manager.req_to_blocks.get(request.request_id, ())):
                if block.is_null:
                    continue
                held.add(block.block_id)
                if position >= policy.resident_from(tokens, size) and block.block_id not in needed:
                    needed.add(block.block_id)
                    empty += min(size, max(0, (position + 1) * size - tokens)) if policy.token_pages else 0
        found.append((len(held), len(needed), empty))
    return found


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    from prometheus_client import CollectorRegistry
    from vllm import LLM, SamplingParams

    from jenga.metrics.engine import EngineReport, report_samples
    from jenga.metrics.prometheus import Exporter
    from jenga.vllm_plugin.residency import residency

    llm = LLM(spec["model"], skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=False, **spec["engine"])
    core = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    coordinator = scheduler.kv_cache_manager.coordinator
    schedule = scheduler.schedule
    registry = CollectorRegistry()
    exporter = Exporter((), registry)
    seen: dict[str, int] = {"reports": 0, "shared": 0, "droppable": 0, "waiting": 0, "stock": 0}

    def checked(*args: Any, **kwargs: Any) -> Any:
        found = residency(coordinator, scheduler, coordinator.allocator.usage())
        uses = [
            (u.held, u.needed, u.empty_tokens if p.group.policy.token_pages else 0)
            for u, p in zip(found.uses, coordinator.kv_cache_config.layout.groups, strict=True)
        ]
        assert uses == walked(coordinator, scheduler), "the short way and the walk differ"
        report = EngineReport.from_dict(json.loads(json.dumps(core.jenga_memory())))
        memory = report.memory
        assert sum(memory.by_cause().values()) == memory.buffer_bytes
        for states, pool in zip(report.checkpoints, coordinator.pools, strict=True):
            if states is not None:
                cache = pool.cached_block_hash_to_block._cache.values()
                there = sum(len(x) if isinstance(x, dict) else 1 for x in cache)
                assert states.kept == there == states.made - sum(states.dropped)
        assert report.requests.resident == len(
            [r for r in scheduler.requests.values() if coordinator.marks.get(r.request_id)]
        )
        seen["reports"] += 1
        seen["shared"] += any(found.shared.values())
        seen["droppable"] += any(h > n for h, n, _ in uses)
        seen["waiting"] += report.requests.waiting > 0
        seen["stock"] += report.stock is not None and report.stock.held > 0
        exporter.publish(report_samples(report))
        return schedule(*args, **kwargs)

    scheduler.schedule = checked
    sampling = SamplingParams(temperature=0, max_tokens=spec["max_tokens"], ignore_eos=True, detokenize=False)
    asked: list[Any] = [{"prompt_token_ids": p} for p in spec["prompts"]]
    cached = []
    for _ in range(2):
        cached += [o.num_cached_tokens for o in llm.generate(asked, sampling, use_tqdm=False)]
    last = core.jenga_memory()
    exporter.publish(report_samples(EngineReport.from_dict(last)))
    exported = [[s.name, s.labels, s.value] for family in registry.collect() for s in family.samples]
    before = [s and s["kept"] for s in last["checkpoints"]]
    scheduler.kv_cache_manager.reset_prefix_cache()
    after = core.jenga_memory()
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    answer = {
        "seen": seen,
        "report": last,
        "exported": exported,
        "cached": cached,
        "vllm": counters,
        "kept_before_reset": before,
        "after_reset": after,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
