"""Hold conversations with one engine, all of them at once turn by turn, and write answers and hits as JSON.

A turn without tokens is one in which the conversation rests.
``JENGA=0|1 python chat_run.py SPEC.json RESULT.json``; a process of its own, like `engine_run.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(spec["model"], enforce_eager=True, disable_log_stats=False, **spec["engine"])
    core = llm.llm_engine.engine_core.engine_core
    coordinator = core.scheduler.kv_cache_manager.coordinator
    jenga = type(coordinator).__module__.startswith("jenga.")
    given_up = 0
    if jenga:
        from jenga.vllm_plugin.states import StateManager

        schedule, give_up = core.scheduler.schedule, StateManager.give_up

        def checked_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            coordinator.check()
            return output

        def counted_give_up(self: Any, request_id: str) -> None:
            nonlocal given_up
            given_up += 1
            give_up(self, request_id)

        core.scheduler.schedule = checked_schedule
        setattr(StateManager, "give_up", counted_give_up)  # noqa: B010
    sampling = SamplingParams(temperature=0, max_tokens=spec["answer"], ignore_eos=True, detokenize=False)
    histories: list[list[int]] = [[] for _ in spec["chats"]]
    answers: list[list[list[int]]] = [[] for _ in spec["chats"]]
    hits: list[list[list[int]]] = [[] for _ in spec["chats"]]
    for turn in range(max(map(len, spec["chats"]))):
        speaking = [i for i, chat in enumerate(spec["chats"]) if turn < len(chat) and chat[turn]]
        for i in speaking:
            histories[i] += spec["chats"][i][turn]
        outputs = llm.generate([{"prompt_token_ids": histories[i]} for i in speaking], sampling, use_tqdm=False)
        for i, output in zip(speaking, outputs, strict=True):
            answer = list(output.outputs[0].token_ids)
            hits[i].append([len(histories[i]), output.num_cached_tokens])
            answers[i].append(answer)
            histories[i] += answer
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result: dict[str, Any] = {
        "jenga": jenga,
        "answers": answers,
        "hits": hits,
        "preemptions": counters["vllm:num_preemptions"],
        "given_up": given_up,
    }
    if jenga:
        coordinator.check()
        result["live_after"] = sum(g.live for g in coordinator.allocator.usage().groups)
        result["evicted"] = sum(coordinator.allocator.counters().evicted_pages)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
