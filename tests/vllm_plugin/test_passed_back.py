"""What is not managed stays with vLLM's own manager from the start, wholly, with one logged line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jenga.demo import make
from tests.vllm_plugin.harness import run

RUNNER = Path(__file__).with_name("passed_back_run.py")
CONNECTOR = "a KV connector is configured"
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "connector": ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, CONNECTOR),
    "offloading": ({"kv_offloading_size": 1}, CONNECTOR),
    "stages": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size > 1"),
    "ngram": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding is configured",
    ),
    "flat": ({"disable_hybrid_kv_cache_manager": True}, "the hybrid KV cache manager is disabled"),
    "match_unit": ({"prefix_match_unit": 16}, "prefix_match_unit is set"),
    "skipped_layers": ({"kv_cache_dtype_skip_layers": ["sliding_window"]}, "kv_cache_dtype_skip_layers is set"),
}
SET: dict[str, str] = {
    "decode_context_parallel_size": "decode_context_parallel_size > 1",
    "prefill_context_parallel_size": "prefill_context_parallel_size > 1",
    "hisparse_config": "HiSparse is configured",
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every configuration planned, in one process."""
    folder = tmp_path_factory.mktemp("passed_back")
    spec = {
        "model": str(make("gemma3-recall", folder)),
        "hybrid": str(make("granite-hybrid", folder)),
        "asked": {"nothing": {}, **{name: given for name, (given, _) in ASKED.items()}},
        "engine": {},
    }
    return run(folder, "planned", spec, jenga=True, runner=RUNNER, VLLM_LOGGING_LEVEL="INFO")


def test_a_plain_configuration_is_managed(planned: dict[str, Any]) -> None:
    assert planned["nothing"] == ["JengaKVCacheConfig", "jenga.vllm_plugin.coordinator", []]


@pytest.mark.parametrize("name", ASKED)
def test_planned_and_scheduled_by_vllm_alone(name: str, planned: dict[str, Any]) -> None:
    config, coordinator, lines = planned[name]
    assert config == "KVCacheConfig"
    assert coordinator.startswith("vllm.")
    (line,) = lines
    assert line.startswith(f"Jenga: vLLM's own memory manager stays in charge: {ASKED[name][1]}")


@pytest.mark.parametrize("name", SET)
def test_grouped_by_vllm_alone(name: str, planned: dict[str, Any]) -> None:
    group, lines = planned[name]
    assert group == "KVCacheGroupSpec"
    (line,) = lines
    assert line == f"Jenga: vLLM's own memory manager stays in charge: {SET[name]}"


def test_blocks_of_a_hybrid_are_natural_only_where_jenga_manages_them(planned: dict[str, Any]) -> None:
    assert planned["hybrid"] == 32
    assert planned["hybrid_with_sinks"] > 100, "vLLM's own planner was left with blocks made for Jenga's"
