"""What the plugin does with configurations that it does not take; answers as JSON.

``JENGA=1 python passed_back_run.py SPEC.json RESULT.json``; nothing is computed, configurations are built and planned.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MEMORY = 24 << 20


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from vllm import logger
    from vllm.config.attention import HiSparseConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.core import kv_cache_manager, kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SinkFullAttentionSpec, SlidingWindowSpec

    load_general_plugins()
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    kept = Kept()
    heads: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    layers = {
        f"model.layers.{i}.self_attn": FullAttentionSpec(**heads)
        if i == 5
        else SlidingWindowSpec(**heads, sliding_window=64)
        for i in range(6)
    }

    def configure(model: str, given: dict[str, Any]) -> Any:
        config = EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=320,
            block_size=32,
            kv_cache_memory_bytes=MEMORY,
            enable_prefix_caching=True,
            **given,
        ).create_engine_config()
        config.cache_config.kv_cache_layout = "LBNHC"  # what the workers' attention would answer
        logging.getLogger("vllm.jenga").addHandler(kept)  # vLLM sets logging up anew with every configuration
        logger._print_info_once.cache_clear()  # each configuration stands for a process of its own
        lines.clear()
        return config

    def plan(config: Any) -> Any:
        stages = config.parallel_config.pipeline_parallel_size
        names = list(layers)
        cut = [names[s * len(names) // stages : (s + 1) * len(names) // stages] for s in range(stages)]
        planned = kv_cache_utils.get_kv_cache_configs(
            config, [{name: layers[name] for name in part} for part in cut], [MEMORY] * stages
        )
        scheduled = kv_cache_utils.generate_scheduler_kv_cache_config(planned)
        coordinator = kv_cache_manager.get_kv_cache_coordinator(
            kv_cache_config=scheduled,
            max_model_len=320,
            max_in_flight_tokens=320,
            use_eagle=False,
            enable_caching=True,
            enable_kv_cache_events=False,
            dcp_world_size=1,
            pcp_world_size=1,
            scheduler_block_size=32,
            hash_block_size=32,
        )
        return [type(planned[0]).__name__, type(coordinator).__module__]

    result: dict[str, Any] = {"jenga": "jenga." in kv_cache_utils.get_kv_cache_groups.__module__}
    for name, given in spec["asked"].items():
        result[name] = [*plan(configure(spec["model"], given)), [line for line in lines if "stays in charge" in line]]

    # vLLM takes these on other machines or for other models only: set behind its back.
    for name, where, value in (
        ("decode_context_parallel_size", "parallel_config", 2),
        ("prefill_context_parallel_size", "parallel_config", 2),
        ("hisparse_config", "attention_config", HiSparseConfig()),
    ):
        config = configure(spec["model"], {})
        setattr(getattr(config, where), name, value)
        groups = kv_cache_utils.get_kv_cache_groups(config, dict(layers))
        result[name] = [type(groups[0]).__name__, [line for line in lines if "stays in charge" in line]]

    class Layer(AttentionLayerBase):
        def __init__(self, spec: Any) -> None:
            self.spec = spec

        def get_attn_backend(self) -> Any:
            return CPUAttentionBackend

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return self.spec

    # The attention of a hybrid: its blocks stay natural only if Jenga will manage them.
    for name, attention in (
        ("hybrid", FullAttentionSpec(**heads)),
        ("hybrid_with_sinks", SinkFullAttentionSpec(**heads, sink_len=16)),
    ):
        config = configure(spec["hybrid"], {})
        config.compilation_config.static_forward_context["model.layers.3.self_attn"] = Layer(attention)
        current_platform.update_block_size_for_backend(config)
        result[name] = config.cache_config.block_size
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
