"""A worker that is not what the scheduler planned for: another node's environment may differ."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVCacheTensor, SlidingWindowSpec

from jenga.grouping import grouping
from jenga.vllm_plugin import config as module
from jenga.vllm_plugin.config import JengaGroupSpec, JengaKVCacheConfig
from jenga.vllm_plugin.groups import describe


def travelled() -> JengaKVCacheConfig:
    """A configuration as a worker gets it."""
    size = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
    groups = [
        KVCacheGroupSpec(["full"], FullAttentionSpec(**size)),
        KVCacheGroupSpec(["window 1", "window 2"], SlidingWindowSpec(**size, sliding_window=32)),
    ]
    layout = grouping(describe(groups), (1, 1), 1 << 20).layout
    placed = [
        JengaGroupSpec(g.layer_names, g.kv_cache_spec, layout=layout, index=index) for index, g in enumerate(groups)
    ]
    made: JengaKVCacheConfig = pickle.loads(pickle.dumps(JengaKVCacheConfig(10, [], list(placed))))
    return made


def tensor(config: JengaKVCacheConfig) -> KVCacheTensor:
    return KVCacheTensor(10 * config.layout.large_page_bytes, ["full"], layer_stride=4096, block_stride=4096)


def test_a_worker_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "registered", lambda: False)
    monkeypatch.setenv("JENGA", "0")
    config = travelled()
    with pytest.raises(RuntimeError, match=r"this worker runs without it \(JENGA=0\): .* alike on all nodes"):
        config.num_blocks_of(tensor(config))


def test_a_worker_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "registered", lambda: True)
    config = travelled()
    assert config.num_blocks_of(tensor(config)) == 10 * config.ratios[0]
    with pytest.raises(
        RuntimeError, match=r"planned with jenga-serve 9\.9, but this worker has .*: install one version"
    ):
        replace(config, planned_by="9.9").num_blocks_of(tensor(config))
