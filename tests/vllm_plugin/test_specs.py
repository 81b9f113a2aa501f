"""Every KV cache type of vLLM is managed, or stays with vLLM's own manager for a reason that is stated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1 import kv_cache_interface as interface
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowMLASpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from jenga.policies import (
    ChunkedLocal,
    CrossAttention,
    FullAttention,
    LatentAttention,
    LayerPolicy,
    RecurrentState,
    SlidingWindow,
)
from jenga.vllm_plugin.groups import PASSED_BACK, bucket_layers, describe, policy_of, spec_obstacle

HEADS: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
STATE: dict[str, Any] = {"block_size": 16, "shapes": ((4, 8),), "dtypes": (torch.float32,)}
MANAGED: dict[str, tuple[dict[str, Any], LayerPolicy]] = {
    "FullAttentionSpec": (HEADS, FullAttention()),
    "MLAAttentionSpec": (HEADS, LatentAttention()),
    "SlidingWindowSpec": (HEADS | {"sliding_window": 48}, SlidingWindow(48)),
    "SlidingWindowMLASpec": (HEADS | {"sliding_window": 48}, SlidingWindow(48)),
    "ChunkedLocalAttentionSpec": (HEADS | {"attention_chunk_size": 64}, ChunkedLocal(64)),
    "MambaSpec": (STATE, RecurrentState()),
    "CrossAttentionSpec": (HEADS, CrossAttention()),
}
OTHERS: dict[str, dict[str, Any]] = {
    "CircularBufferSpec": HEADS,
    "EncoderOnlyAttentionSpec": HEADS,
    "HiddenStateCacheSpec": HEADS,
    "HiSparseHotSpec": {"block_size": 16, "page_size": 4096, "blocks_per_request": 2},
    "HiSparseResidentSpec": {"block_size": 16, "page_size": 4096},
    "RSWASpec": HEADS | {"rswa_window": 48},
    "SinkFullAttentionSpec": HEADS | {"sink_len": 16},
}
NO_LAYERS = {"KVCacheSpec", "AttentionSpec", "UniformTypeKVCacheSpecs"}
"""Bases, and the wrapper of a whole group."""


def specs_of_vllm() -> dict[str, type[KVCacheSpec]]:
    return {
        name: each for name, each in vars(interface).items() if isinstance(each, type) and issubclass(each, KVCacheSpec)
    }


def test_no_type_of_vllm_slips_through() -> None:
    assert set(specs_of_vllm()) == {*MANAGED, *OTHERS, *NO_LAYERS}
    assert {spec.__name__ for spec in PASSED_BACK} == set(OTHERS)
    register_all_kvcache_specs(None)
    registered = KVCacheSpecRegistry.get_manager_class
    for name in MANAGED:
        assert registered(specs_of_vllm()[name](**MANAGED[name][0])) is not None


@pytest.mark.parametrize("name", MANAGED)
def test_managed(name: str) -> None:
    fields, policy = MANAGED[name]
    spec = specs_of_vllm()[name](**fields)
    assert policy_of(spec) == policy
    assert spec_obstacle({"layer": spec}) is None
    (group,) = describe(bucket_layers({"a": spec, "b": spec}))
    assert (group.layers, group.page_bytes, group.policy) == (2, 2 * spec.page_size_bytes, policy)


@pytest.mark.parametrize("name", OTHERS)
def test_passed_back_with_a_reason(name: str) -> None:
    spec = specs_of_vllm()[name](**OTHERS[name])
    assert policy_of(spec) is None
    managed = specs_of_vllm()["FullAttentionSpec"](**HEADS)
    reason = spec_obstacle({"first": managed, "second": spec})
    assert reason == f"layer second has a KV cache of type {name}: {PASSED_BACK[type(spec)]}"


def test_windows_that_are_more_than_a_window_are_passed_back() -> None:
    plain = SlidingWindowMLASpec(**HEADS, sliding_window=48)
    for spec in (
        SlidingWindowSpec(**HEADS, sliding_window=48, extra_retained_tokens=2),
        replace(plain, bounded_replay=True),
        replace(plain, model_version="deepseek_v4"),
        replace(plain, alignment=576),
    ):
        assert policy_of(spec) is None
        reason = spec_obstacle({"layer": spec})
        assert reason is not None
        assert "window" in reason


def test_a_type_nobody_knows_is_passed_back() -> None:
    class Newer(interface.FullAttentionSpec):
        pass

    assert spec_obstacle({"layer": Newer(**HEADS)}) == (
        "layer layer has a KV cache of type Newer: which Jenga does not know"
    )


def test_each_rule_is_a_group_of_its_own() -> None:
    groups = describe(
        bucket_layers(
            {
                "a": SlidingWindowSpec(**HEADS, sliding_window=32),
                "b": SlidingWindowMLASpec(**HEADS, sliding_window=48),
                "c": interface.CrossAttentionSpec(**HEADS),
                "d": interface.FullAttentionSpec(**HEADS),
            }
        )
    )
    names = [group.name for group in groups]
    assert names[0] == "full_attention"
    assert set(names[1:]) == {"sliding_window_32", "sliding_window_mla_48", "cross_attention"}
