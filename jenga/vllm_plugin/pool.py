"""vLLM's BlockPool interface over the two-level allocator.

Each layer group's manager gets a `GroupPool` of its own: vLLM's block objects, reference counts and hash tables stay
vLLM's, while `jenga.allocator` decides which pages they are.  Scheduler and KVCacheManager see one `SharedPool`,
which counts in large pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView, Sequence
from typing import Any

from vllm.distributed.kv_events import MEDIUM_GPU, AllBlocksCleared, BlockStored, KVCacheEvent
from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock, resolve_block_hashes
from vllm.v1.request import Request

from jenga.allocator import TwoLevelAllocator
from jenga.vllm_plugin.chains import Chains
from jenga.vllm_plugin.counters import PageIndex
from jenga.vllm_plugin.events import placed

logger = init_logger("vllm.jenga")

Run = tuple[int, int, list[int], bool]
"""Token at which the last of these pages ends, group, pages of one large page, whether their contents are kept."""

# vLLM leaves these untyped.
_reset_hash: Callable[[KVCacheBlock], None] = KVCacheBlock.reset_hash


class GroupPool(BlockPool):
    """Blocks of one layer group.  Inherits hashing, lookup and events; allocation is the allocator's."""

    def __init__(  # the parent would build one flat free list: deliberately not called
        self,
        allocator: TwoLevelAllocator,
        group: int,
        template: BlockPool,
        events: list[KVCacheEvent],
    ) -> None:
        self.allocator = allocator
        self.group = group
        self.num_gpu_blocks = allocator.large_pages * allocator.ratios[group]
        self.medium = MEDIUM_GPU
        self.enable_caching = template.enable_caching
        self.hash_block_size = template.hash_block_size
        self.blocks = [KVCacheBlock(i, pool=self) for i in range(self.num_gpu_blocks)]
        self.cached_block_hash_to_block: PageIndex = PageIndex()
        self.chains: Chains | None = None
        """To be told of pages that can be found now."""
        self.lost: list[tuple[int, BlockHashWithGroupId]] | None = None
        """Pages and the names that they have lost, for `Chains.sweep`."""
        self.cached_block_hashes_by_block = {}
        self.null_block = self.blocks[0]
        self.null_block.is_null = True
        self.enable_kv_cache_events = template.enable_kv_cache_events
        self.kv_event_queue = events  # one list for all groups: events keep their order
        self.metrics_collector: KVCacheMetricsCollector | None = template.metrics_collector
        self._reuse_watchers = {}

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """`num_blocks` blocks of this group, each with one reference.

        Raises:
            OutOfPagesError: they are not there.
        """
        blocks = [self.blocks[i] for i in self.allocator.allocate(self.group, num_blocks)]
        for block in blocks:
            assert block.ref_cnt == 0
            assert block.block_hash is None
            block.ref_cnt = 1
            if self.metrics_collector:
                self.metrics_collector.on_block_allocated(block)
        return blocks

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """One more reference to each block; a cached one becomes live."""
        ratio = self.allocator.ratios[self.group]
        run: list[int] = []  # of one large page
        for block in blocks:
            if block.is_null:
                continue
            if block.ref_cnt == 0:
                if run and run[0] // ratio != block.block_id // ratio:
                    self.allocator.revive_run(self.group, run)
                    run = []
                run.append(block.block_id)
            block.ref_cnt += 1
            if self.metrics_collector:
                self.metrics_collector.on_block_accessed(block)
        if run:
            self.allocator.revive_run(self.group, run)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """One reference less to each block, first to be evicted first."""
        for block in ordered_blocks:
            assert block.pool is self
            self.release(block)

    def release(self, block: KVCacheBlock) -> None:
        """One reference less; at none the page is cached if it has a hash, else free."""
        if block.is_null:
            return
        block.ref_cnt -= 1
        if block.ref_cnt == 0:
            keep = self.enable_caching and block.block_hash is not None
            self.allocator.release(self.group, block.block_id, keep)

    def drop_references(self, blocks: Sequence[KVCacheBlock], page_tokens: int) -> list[Run]:
        """One reference less to each block of a request; the pages that nobody holds any more, for the allocator.

        Tail first, cut into runs that the allocator can release at once.
        """
        runs: list[Run] = []
        null, caching, ratio = self.null_block, self.enable_caching, self.allocator.ratios[self.group]
        pages: list[int] = []
        large, keep, end = -1, False, 0
        for index, block in zip(range(len(blocks), 0, -1), reversed(blocks), strict=True):
            if block is null:
                continue
            block.ref_cnt -= 1
            if block.ref_cnt:
                continue
            page, cached = block.block_id, caching and block.block_hash is not None
            if page // ratio != large or cached is not keep:
                if pages:
                    runs.append((end, self.group, pages, keep))
                pages, large, keep = [], page // ratio, cached
            pages.append(page)
            end = index * page_tokens
        if pages:
            runs.append((end, self.group, pages, keep))
        return runs

    def evicted(self, page: int) -> None:
        """The allocator took a cached page's contents away."""
        self._maybe_evict_cached_block(self.blocks[page])

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop these pages' contents from the prefix cache; what only they led to goes with the next sweep."""
        for page in block_ids:
            self.uncache(self.blocks[page])

    def uncache(self, block: KVCacheBlock, cause: str = "evicted") -> None:
        """Drop one page's contents from the prefix cache; it comes free unless someone holds it.

        `cause` is one of `CHECKPOINT_CAUSES`.
        """
        index = self.cached_block_hash_to_block
        index.cause = cause
        found = self._maybe_evict_cached_block(block)
        index.cause = "evicted"
        if found and not block.ref_cnt:
            self.allocator.forget(self.group, block.block_id, unreachable=cause == "unreachable")

    def drop_unreachable(self, name: BlockHashWithGroupId) -> None:
        """No hit can get to the pages with this name: those that nobody holds come free."""
        for block in self.cached_block_hash_to_block.copies(name):
            if not block.ref_cnt:
                self.uncache(block, "unreachable")

    @property
    def names(self) -> KeysView[BlockHashWithGroupId]:
        """Names that some page has."""
        return self.cached_block_hash_to_block.names

    def _remove_cached_block_hashes(self, block: KVCacheBlock) -> list[BlockHashWithGroupId]:
        names: list[BlockHashWithGroupId] = super()._remove_cached_block_hashes(block)
        if self.lost is not None:
            self.lost += [(block.block_id, name) for name in names]
        return names

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """Make full blocks of a request findable."""
        super().cache_full_blocks(
            request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id, block_mask
        )
        if self.chains is not None and num_cached_blocks < num_full_blocks:
            self.chains.stored(request, self.group, blocks, num_cached_blocks, num_full_blocks, block_size)

    def cache_partial_block(
        self,
        request: Request,
        block: KVCacheBlock,
        num_tokens: int,
        kv_cache_group_id: int,
        block_size: int,
        replace_existing_hashes: bool = False,
    ) -> BlockHashWithGroupId | None:
        """Make a block findable by the tokens that it has so far."""
        name: BlockHashWithGroupId | None = super().cache_partial_block(
            request, block, num_tokens, kv_cache_group_id, block_size, replace_existing_hashes
        )
        if self.chains is not None and name is not None:
            self.chains.placed(request, self.group, name, num_tokens)
        return name

    def _build_block_stored_event(self, request: Request, *args: Any, **where: Any) -> BlockStored:
        event = super()._build_block_stored_event(request, *args, **where)
        hashes = resolve_block_hashes(request.block_hashes, self.hash_block_size, event.block_size)
        return placed(event, hashes, where["start_token_idx"] // event.block_size)

    def forget_all(self) -> None:
        """Drop everything cached (nothing may be live), without an event per page."""
        for block in self.blocks:
            if block.block_hash is not None:
                _reset_hash(block)
                self.allocator.forget(self.group, block.block_id)
        self.cached_block_hash_to_block.clear()
        self.cached_block_hashes_by_block.clear()

    def get_num_free_blocks(self) -> int:
        """Large pages available to this group: the unit of every admission sum."""
        return self.allocator.available


class SharedPool:
    """What scheduler and KVCacheManager know as `block_pool`; counts are large pages."""

    def __init__(self, allocator: TwoLevelAllocator, template: BlockPool) -> None:
        self.allocator = allocator
        self.pools: tuple[GroupPool, ...] = ()
        self.enable_caching = template.enable_caching
        self.hash_block_size = template.hash_block_size
        self.enable_kv_cache_events = template.enable_kv_cache_events
        self.metrics_collector = template.metrics_collector
        self.num_gpu_blocks = allocator.large_pages
        self.events: list[KVCacheEvent] = []

    @property
    def null_block(self) -> KVCacheBlock:
        """Any group's null block (vLLM only compares ids with it)."""
        return self.pools[0].null_block

    def get_num_free_blocks(self) -> int:
        """Large pages that hold nothing live."""
        return self.allocator.available

    def get_usage(self) -> float:
        """Share of the grantable large pages that hold something live, 0 to 1."""
        return 1.0 - self.allocator.available / (self.allocator.large_pages - self.allocator.reserved)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Release blocks of any groups, first to be evicted first; they age together."""
        self.allocator.tick()
        for block in ordered_blocks:
            pool = block.pool
            assert isinstance(pool, GroupPool)
            pool.release(block)

    def reset_prefix_cache(self) -> bool:
        """Forget everything cached.  False, and nothing is changed, while requests hold pages."""
        live = sum(g.live for g in self.allocator.usage().groups)
        if live:
            logger.warning("Failed to reset prefix cache because some blocks (%d) are not freed yet", live)
            return False
        for pool in self.pools:
            pool.forget_all()
        if self.metrics_collector:
            self.metrics_collector.reset()
        if self.enable_kv_cache_events:
            self.events.append(AllBlocksCleared())
        logger.info("Successfully reset prefix cache")
        return True

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Not answerable: a bare id names one page in every group.

        Raises:
            ValueError: always (only KV connectors ask, and Jenga leaves those to vLLM's own manager).
        """
        raise ValueError(f"block ids {sorted(block_ids)[:5]} name a page in every group; evict through a group's pool")

    def take_events(self) -> list[KVCacheEvent]:
        """All groups' events since the last call, in the order they happened."""
        if not self.enable_kv_cache_events:
            return []
        events = list(self.events)
        self.events.clear()
        return events
