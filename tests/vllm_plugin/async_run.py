"""Conversations through vLLM's schedulers without a model, one step in flight or two; hits and books as JSON.

``python async_run.py MODEL RESULT.json``; the CPU back end turns async scheduling off, so the scheduler is driven here.
"""

from __future__ import annotations

import json
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BLOCK, FIRST, QUESTION, ANSWER, TURNS = 32, 300, 40, 100, 4


def converse(scheduler: Any, hasher: Any, depth: int) -> list[int]:
    """Cached tokens of each turn of one conversation, with up to `depth` steps in flight."""
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    rng = random.Random(1)
    history: list[int] = []
    hits = []
    for turn in range(TURNS):
        history += [rng.randrange(40, 200) for _ in range(QUESTION if turn else FIRST)]
        request = Request(
            str(turn), list(history), SamplingParams(max_tokens=ANSWER, ignore_eos=True), None, block_hasher=hasher
        )
        scheduler.add_request(request)
        flying: deque[Any] = deque()
        while scheduler.has_unfinished_requests() or flying:
            if scheduler.has_unfinished_requests():
                step = scheduler.schedule()
                scheduler.kv_cache_manager.coordinator.check()
                hits += [new.num_computed_tokens for new in step.scheduled_new_reqs]
                flying.append((step, {r: scheduler.requests[r].num_computed_tokens for r in step.num_scheduled_tokens}))
                if len(flying) < depth and step.num_scheduled_tokens:
                    continue
            done, reached = flying.popleft()
            ids = list(done.num_scheduled_tokens)
            index = {r: i for i, r in enumerate(ids)}
            sampled = [[7] if reached[r] >= len(history) else [] for r in ids]
            scheduler.update_from_output(
                done, ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=sampled)
            )
        history += list(request.output_token_ids)
        assert len(request.output_token_ids) == ANSWER
    return hits


def main() -> None:
    from vllm import LLM
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    llm = LLM(
        sys.argv[1],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=1024,
        block_size=BLOCK,
        kv_cache_memory_bytes=32 << 20,
        enable_prefix_caching=True,
    )
    made = llm.llm_engine.engine_core.engine_core.scheduler
    hasher = get_request_block_hasher(made.hash_block_size, get_hash_fn_by_name("sha256"))
    result = {}
    for name, kind, depth in (("sync", Scheduler, 1), ("async", AsyncScheduler, 2)):
        scheduler = kind(
            vllm_config=made.vllm_config,
            kv_cache_config=made.kv_cache_config,
            structured_output_manager=made.structured_output_manager,
            block_size=made.block_size,
            hash_block_size=made.hash_block_size,
            log_stats=False,
        )
        hits = converse(scheduler, hasher, depth)
        usage = scheduler.kv_cache_manager.coordinator.allocator.usage()
        result[name] = {"hits": hits, "live_after": sum(g.live for g in usage.groups)}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
