"""Tensor parallelism: two workers of one engine, each with its share of the heads and the same geometry."""

from __future__ import annotations

from pathlib import Path

from jenga.demo import make
from tests.vllm_plugin.harness import differing, prompts, run


def test_two_workers_agree_and_say_the_same_as_stock(tmp_path: Path) -> None:
    spec = {
        "model": str(make("gemma4", tmp_path / "models")),  # its full layer has one key head, which both workers keep
        "max_tokens": 40,
        "rounds": 2,
        "check": True,
        "prompts": prompts(6, 200),
        "engine": {
            "dtype": "float32",
            "max_model_len": 320,
            "block_size": 32,
            "kv_cache_memory_bytes": int(2.3 * 2**20),
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 200,
            "max_num_seqs": 8,
            "tensor_parallel_size": 2,
        },
    }
    jenga, stock = (run(tmp_path, name, spec, jenga=name == "jenga") for name in ("jenga", "stock"))
    assert differing(jenga, stock) == 0
    assert sum(jenga["cached"][1]) > 0
    assert sum(jenga["evicted"]) > 0
    assert jenga["live_after"] == 0
    assert jenga["checks"] > 50
    first, second = jenga["geometries"]
    assert first == second
    assert first[:2] == ["JengaKVCacheConfig", jenga["num_blocks"]]
