"""What vLLM's own plan would hold, against vLLM's own manager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from jenga.metrics.stock import STEP, StockPlan
from jenga.policies import CrossAttention, FullAttention, SlidingWindow
from jenga.vllm_plugin.planning import stock_group

SHAPE: dict[str, Any] = {"num_kv_heads": 1, "head_size": 16, "dtype": torch.bfloat16}
FULL = FullAttentionSpec(block_size=16, **SHAPE)
WINDOW = SlidingWindowSpec(block_size=16, sliding_window=100, **SHAPE)
CHUNK = ChunkedLocalAttentionSpec(block_size=16, attention_chunk_size=64, **SHAPE)
STATE = MambaSpec(block_size=16, shapes=((512,),), dtypes=(torch.int8,), mamba_cache_mode="align")
MODELS: dict[str, list[KVCacheSpec]] = {
    "windows": [FULL, WINDOW, WINDOW, WINDOW],
    "chunks": [FULL, CHUNK, CHUNK],
    "states": [FULL, STATE, STATE],
}


def stock(specs: list[KVCacheSpec]) -> tuple[KVCacheManager, StockPlan]:
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    init_none_hash(sha256)
    manager = KVCacheManager(
        KVCacheConfig(4000, [], groups),
        max_model_len=4096,
        scheduler_block_size=16,
        hash_block_size=16,
        max_in_flight_tokens=4096,
        enable_caching=True,
    )
    return manager, StockPlan.of(specs[0].page_size_bytes, map(stock_group, groups))


def request(name: str, tokens: int, shared: int = 0) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[7] * shared + [hash((name, i)) % 1000 + 10 for i in range(tokens - shared)],
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=get_request_block_hasher(16, sha256),
    )


def compute(manager: KVCacheManager, one: Request, upto: int) -> None:
    """As the scheduler does, in one chunk, with what the cache has."""
    blocks, hit, _ = manager.get_computed_blocks(one) if one.num_computed_tokens == 0 else (None, 0, 0)
    assert manager.allocate_slots(one, upto - one.num_computed_tokens - hit, hit, blocks) is not None
    one.num_computed_tokens = upto
    manager.remove_skipped_blocks(one.request_id, upto)


def held(manager: KVCacheManager) -> int:
    """Blocks that requests hold: all but the free ones and the null block."""
    pool = manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


@pytest.mark.parametrize("name", MODELS)
def test_one_request_holds_what_vllm_s_manager_gives_it(name: str) -> None:
    manager, plan = stock(MODELS[name])
    one = request("a", 1000)
    for tokens in (1, 15, 16, 17, 64, 100, 101, 115, 128, 129, 500, 999):
        compute(manager, one, tokens)
        assert held(manager) == plan.blocks(tokens), f"{tokens} tokens"


def test_a_shared_prefix_counts_once() -> None:
    manager, plan = stock([FULL, WINDOW])
    for name in ("a", "b", "c"):
        compute(manager, request(name, 500, shared=320), 500)
    # Each window has left the prefix behind; the full blocks of the prefix are held three times.
    shared = {FullAttention(): 2 * 320}
    assert plan.held_bytes([500] * 3, shared) == held(manager) * plan.block_bytes


def test_lengths_count_as_the_middle_of_their_step() -> None:
    plan = StockPlan.of(10, [(FullAttention(), 16), (SlidingWindow(32), 16), (SlidingWindow(32), 16)])
    for length in range(1, 200):
        middle = length // STEP * STEP + STEP // 2
        assert plan.held_bytes([length], {}) == 10 * plan.blocks(middle)
    lengths = [1, 50, 50, 199]
    assert plan.held_bytes(lengths, {}) == sum(plan.held_bytes([n], {}) for n in lengths)
    assert plan.held_bytes([], {FullAttention(): 160}) == 0


def test_encoder_tokens_are_cross_attention_s() -> None:
    plan = StockPlan.of(10, [(FullAttention(), 16), (CrossAttention(), 16)])
    assert plan.held_bytes([8], {}, encoder_tokens=1500) == 10 * (1 + 94)
