"""One prompt for a model and its LoRA adapters, again and again; answers and hits as JSON.

``JENGA=0|1 python lora_run.py SPEC.json RESULT.json``; a process of its own, like `engine_run.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if os.environ["JENGA"] == "0":  # or stock cannot run Mamba-2 with prefix caching on a CPU at all
        from jenga.vllm_plugin.cpu_fixes import disable_mamba2_prefill_checkpoints

        disable_mamba2_prefill_checkpoints()
    adapters = spec["adapters"]
    llm = LLM(
        spec["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(adapters),
        **spec["engine"],
    )
    coordinator = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator
    loras = [None, *(LoRARequest(Path(path).name, number, path) for number, path in enumerate(adapters, 1))]
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)

    def ask(prompts: list[list[int]], lora: list[Any]) -> list[Any]:
        asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        return list(llm.generate(asked, sampling, use_tqdm=False, lora_request=lora))

    prompt, longer = spec["prompts"]
    # Each alone (on vLLM's CPU back end the base model beside adapters answers as the last of them), then with another
    # end, the adapters at once.
    rounds = [[ask([prompt], [lora])[0] for lora in loras] for _ in range(2)]
    rounds.append(ask([longer], loras[:1]) + ask([longer] * len(adapters), loras[1:]))
    result: dict[str, Any] = {
        "jenga": type(coordinator).__module__.startswith("jenga."),
        "tokens": [[list(o.outputs[0].token_ids) for o in outputs] for outputs in rounds],
        "cached": [[o.num_cached_tokens for o in outputs] for outputs in rounds],
    }
    if result["jenga"]:
        coordinator.check()
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
