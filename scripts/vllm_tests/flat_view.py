"""What vLLM's tests read of its one flat pool, answered by Jenga's pools.

vLLM's own code asks a coordinator's pool only what `SharedPool` offers; its tests also look inside.  Where one group
has one page per large page, or a question names its group, there is an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.v1.core import block_pool
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock, get_group_id

from jenga.allocator import TwoLevelAllocator
from jenga.vllm_plugin.pool import GroupPool, SharedPool


class FreeQueue:
    """vLLM's queue of free blocks: those without contents, then the cached ones, next to be evicted first."""

    def __init__(self, pool: SharedPool) -> None:
        self._pool = pool
        self.fake_free_list_tail = SimpleNamespace(prev_free_block=None)
        self.fake_free_list_head = SimpleNamespace(next_free_block=None)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("fake_free_list"):  # the ends of vLLM's linked list
            head, tail = (self.__dict__[f"fake_free_list_{end}"] for end in ("head", "tail"))
            blocks = self.get_all_free_blocks()
            head.next_free_block, tail.prev_free_block = (blocks[0], blocks[-1]) if blocks else (tail, head)
        return super().__getattribute__(name)

    @property
    def num_free_blocks(self) -> int:
        """Large pages that nobody uses."""
        return self._pool.allocator.available

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """The blocks in the order in which they would be granted."""
        (only,) = self._pool.pools
        allocator = self._pool.allocator
        assert allocator.ratios == (1,), "pages of unlike size have no common queue"
        return [only.blocks[page] for page in (*reversed(allocator._free), *allocator._evictable)]


class HashTable:
    """vLLM's table of cached blocks, of which Jenga has one in every group."""

    def __init__(self, pools: Sequence[GroupPool]) -> None:
        self._pools = pools

    @property
    def _cache(self) -> dict[BlockHashWithGroupId, Any]:
        return {k: v for pool in self._pools for k, v in pool.cached_block_hash_to_block._cache.items()}

    def __len__(self) -> int:
        return sum(len(pool.cached_block_hash_to_block) for pool in self._pools)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ("get_one_block", "contain", "insert", "pop"):
            raise AttributeError(name)

        def in_its_group(key: BlockHashWithGroupId, *rest: Any) -> Any:
            table: BlockHashToBlockMap = self._pools[get_group_id(key)].cached_block_hash_to_block
            return getattr(table, name)(key, *rest)

        return in_its_group


def get_cached_block(
    self: SharedPool, block_hash: BlockHash, kv_cache_group_ids: list[int]
) -> list[KVCacheBlock] | None:
    """The cached blocks of all these groups, None if one has none."""
    found = [self.pools[group].get_cached_block(block_hash, [group]) for group in kv_cache_group_ids]
    return None if any(f is None for f in found) else [block for f in found if f for block in f]


def missing(self: SharedPool, name: str) -> Any:
    """An attribute of vLLM's pool that `SharedPool` lacks."""
    if name == "free_block_queue":
        return FreeQueue(self)
    if name == "cached_block_hash_to_block":
        return HashTable(self.pools)
    if name == "kv_event_queue":
        return self.events
    if not name.startswith("__") and len(pools := self.__dict__.get("pools", ())) == 1:
        return getattr(pools[0], name)
    raise AttributeError(f"Jenga's shared pool has no {name}: it belongs to a group")


class LonePool(GroupPool):
    """A pool that a test makes for itself, as vLLM's `BlockPool` is made: one group, a page in each large page."""

    def __init__(
        self,
        num_gpu_blocks: int,
        enable_caching: bool,
        hash_block_size: int,
        enable_kv_cache_events: bool = False,
        metrics_collector: KVCacheMetricsCollector | None = None,
    ) -> None:
        template = BlockPool(2, enable_caching, hash_block_size, enable_kv_cache_events, metrics_collector)
        allocator = TwoLevelAllocator(num_gpu_blocks, [1], on_evict=lambda _, page: self.evicted(page))
        self.shared = SharedPool(allocator, template)
        super().__init__(allocator, 0, template, self.shared.events)
        self.shared.pools = (self,)
        seen_pools.append(self)

    def reset_prefix_cache(self) -> bool:
        """Forget everything cached."""
        return self.shared.reset_prefix_cache()

    @property
    def free_block_queue(self) -> FreeQueue:
        """The blocks that nobody uses."""
        return FreeQueue(self.shared)


seen_pools: list[LonePool] = []
"""Pools that the running test made."""


def install() -> None:
    """Let tests look into the pools, and make pools of their own."""
    block_pool.BlockPool = LonePool  # only for what is imported from now on: the tests
    SharedPool.__getattr__ = missing
    SharedPool.get_cached_block = get_cached_block
