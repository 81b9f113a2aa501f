"""vLLM's KV cache coordinator on the two-level allocator and the common hit rule.

vLLM's per-type managers stay in charge of block tables; they are given pools of their own.  What changes is what is
decided across groups: admission (in large pages, exactly), the prefix hit (`jenga.hits`) and the order of release.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from time import monotonic
from typing import Any, cast

from vllm.v1.core import kv_cache_coordinator as vllm_coordinator
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashListWithBlockSize,
    KVCacheBlock,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import CrossAttentionManager, MambaManager, SingleTypeKVCacheManager
from vllm.v1.request import Request

from jenga.allocator import CLOCK_HZ, PageState, TwoLevelAllocator
from jenga.hits import GroupCache, Hit, longest_common_hit
from jenga.metrics.engine import HitTotals
from jenga.vllm_plugin.chains import Chains
from jenga.vllm_plugin.checkpoints import Checkpoints, Kept
from jenga.vllm_plugin.config import JengaKVCacheConfig
from jenga.vllm_plugin.counters import PageIndex, Refusals, StateIndex
from jenga.vllm_plugin.parts import PartIds
from jenga.vllm_plugin.pool import GroupPool, SharedPool
from jenga.vllm_plugin.states import StateManager
from jenga.vllm_plugin.steady import Marks, is_steady

Blocks = tuple[list[KVCacheBlock], ...]

FAR = 1 << 40
"""Tokens; longer than any sequence."""

REMEMBERED = 1 << 15
"""Lengths for which is remembered when they drop something next: a few MiB."""

LOST_AT_ONCE = 64
"""Pages; when an allocation has evicted more of them, what only they led to is freed before the next one."""

ANSWER_SHARE = 0.5
"""Most of the available large pages that the ends of running answers may take: the rest is for what others share."""


class JengaCoordinator(vllm_coordinator.KVCacheCoordinator):
    """The part common to running with and without prefix caching; a mixin in front of vLLM's class."""

    kv_cache_config: JengaKVCacheConfig
    block_pool: Any  # vLLM's own during its constructor, a SharedPool from `adopt` on

    def adopt(self) -> None:
        """Give every manager a pool on the shared allocator.  Called once, after vLLM's own constructor."""
        config, template = self.kv_cache_config, self.block_pool
        layout = config.layout
        self.allocator = TwoLevelAllocator(
            config.num_blocks, layout.ratios, widths=layout.parts, on_evict=self._evicted
        )
        self.part_ids = PartIds(self.allocator)
        # One manager per layer type keeps the books of all parts of its pages.
        types = len(layout.groups)
        self.single_type_managers = self.single_type_managers[:types]
        self.group_block_sizes = self.group_block_sizes[:types]
        shared = SharedPool(self.allocator, template)
        self.pools = tuple(GroupPool(self.allocator, g, template, shared.events) for g in range(types))
        shared.pools = self.pools
        self.block_pool = shared
        for manager, pool in zip(self.single_type_managers, self.pools, strict=True):
            manager.block_pool = pool
            manager._null_block = pool.null_block
        none = (0,) * len(self.pools)
        self.hits = HitTotals(0, 0, 0, 0, 0, reused_pages=none, ended=none)
        self.refusals = Refusals(self.allocator)
        self._last_hit = Hit(0, 0, None)
        self._looked_up = 0
        self._reused = [0] * len(self.pools)
        self._needs: tuple[str, list[int]] | None = None
        self._giving_up: list[StateManager] = []  # whose kept states the latest needs let be overwritten
        self._policies = tuple(g.group.policy for g in layout.groups)
        self._steady = not self.eagle_group_ids and all(map(is_steady, self.single_type_managers))
        # A state that moves on may leave a page behind, to be dropped with the next step.
        self._leaves_behind = any(isinstance(m, MambaManager) for m in self.single_type_managers)
        self.marks: dict[str, Marks] = {}
        self._next_drop = lru_cache(REMEMBERED)(self._find_next_drop)
        droppers = [
            (manager, partial(policy.resident_from, page_tokens=manager.block_size))
            for manager, policy in zip(self.single_type_managers, self._policies, strict=True)
            if policy.resident_from(FAR, manager.block_size) > 0
        ]
        self._droppers = [manager for manager, _ in droppers]
        self._first_needed = [first_needed for _, first_needed in droppers]
        idle = SingleTypeKVCacheManager.new_step_starts
        self._stepping = [m for m in self.single_type_managers if type(m).new_step_starts is not idle]
        self._no_blocks: Blocks = tuple([] for _ in self.pools)

    def _evicted(self, group: int, page: int) -> None:
        self.pools[group].evicted(page)

    def sweep(self, most: int = 0) -> None:
        """Free what no hit can get to any more, if more than `most` pages were evicted since it was done last."""

    # -- admission ------------------------------------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Large pages that this request would take from those available; exact, and without side effects of ours."""
        marks = self.marks.get(request_id)
        if marks is not None and num_tokens <= marks.slots:
            return 0
        if self.retention_interval != 0:
            prefill_end = 0
        needs: list[int] = []
        pins: list[list[int]] = []
        for manager, hits in zip(self.single_type_managers, new_computed_blocks, strict=True):
            # Blocks that nobody holds are counted by vLLM's managers as if they came from one flat free list.
            pinned = [b.block_id for b in hits if b.ref_cnt == 0 and not b.is_null]
            if isinstance(manager, CrossAttentionManager):
                blocks = manager.get_num_blocks_to_allocate(
                    request_id, num_encoder_tokens, [], 0, 0, num_encoder_tokens, apply_admission_cap
                )
            else:
                blocks = manager.get_num_blocks_to_allocate(
                    request_id,
                    num_tokens,
                    hits,
                    total_computed_tokens,
                    num_local_computed_tokens,
                    num_tokens_main_model,
                    apply_admission_cap=apply_admission_cap,
                    prefill_end=prefill_end,
                )
            needs.append(blocks - len(pinned))
            pins.append(pinned)
        pages = self.allocator.large_pages_needed(needs, pins)
        self._giving_up = []
        if pages > self.allocator.available:
            self._giving_up = [
                m
                for m, n in zip(self.single_type_managers, needs, strict=True)
                if n and isinstance(m, StateManager) and m.can_give_up(request_id, num_tokens_main_model)
            ]
            if self._giving_up:
                needs = [n - (m in self._giving_up) for m, n in zip(self.single_type_managers, needs, strict=True)]
                pages = self.allocator.large_pages_needed(needs, pins)
            if pages > self.allocator.available:
                self.refusals.refuse(request_id, marks is not None, needs, pins)
        self._needs = (request_id, needs)
        return pages

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int, num_encoder_tokens: int = 0
    ) -> Blocks:
        """Allocate what the last query for this request announced, group by group."""
        marks = self.marks.get(request_id)
        if marks is not None and num_tokens <= marks.slots:
            return self._no_blocks
        if self._needs is not None and self._needs[0] == request_id:
            self.allocator.expect(self._needs[1])
            for manager in self._giving_up:
                index = cast(PageIndex, manager.block_pool.cached_block_hash_to_block)
                index.cause = "overwritten"
                manager.give_up(request_id)
                index.cause = "evicted"
        try:
            blocks: Blocks = super().allocate_new_blocks(
                request_id, num_tokens, num_tokens_main_model, num_encoder_tokens
            )
        finally:
            self.allocator.expect([0] * len(self.pools))
            self._needs = None
        self.sweep(most=LOST_AT_ONCE)
        if marks is None:
            self._count_hit()
            self.refusals.admitted(request_id)
            marks = self.marks[request_id] = Marks()
        if self._leaves_behind:
            marks.droppable = 0
        if self._steady:
            marks.slots = min([len(m.req_to_blocks[request_id]) * m.block_size for m in self.single_type_managers])
        return blocks

    def allocate_new_computed_blocks(
        self, request_id: str, new_computed_blocks: tuple[Sequence[KVCacheBlock], ...], *args: Any, **kwargs: Any
    ) -> None:
        """Take over the blocks of a prefix hit."""
        self._reused = [sum(not b.is_null for b in row) for row in new_computed_blocks]
        super().allocate_new_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)

    def _count_hit(self) -> None:
        hit, before = self._last_hit, self.hits
        taken = any(self._reused)
        short = hit.furthest > hit.tokens
        self.hits = HitTotals(
            requests=before.requests + 1,
            lookup_tokens=before.lookup_tokens + self._looked_up,
            hit_requests=before.hit_requests + taken,
            hit_tokens=before.hit_tokens + (hit.tokens if taken else 0),
            missed_shared_tokens=before.missed_shared_tokens + hit.furthest - hit.tokens,
            reused_pages=tuple(a + b for a, b in zip(before.reused_pages, self._reused, strict=True)),
            ended=tuple(n + (short and g == hit.limited_by) for g, n in enumerate(before.ended)),
        )
        self._last_hit = Hit(0, 0, None)
        self._looked_up = 0
        self._reused = [0] * len(self.pools)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Make full pages findable.  Hits are multiples of the scheduler's block: only there is something new."""
        marks = self.marks.get(request.request_id)
        if marks is not None and num_computed_tokens < marks.cacheable:
            return
        self._cache_pages(request, num_computed_tokens)
        if marks is not None and self._steady:
            marks.cacheable = num_computed_tokens - num_computed_tokens % self.scheduler_block_size
            marks.cacheable += self.scheduler_block_size

    def _cache_pages(self, request: Request, num_computed_tokens: int) -> None:
        super().cache_blocks(request, num_computed_tokens)

    # -- release --------------------------------------------------------------------------------------------

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Drop the pages that no token from number `processed_computed_tokens` on needs."""
        marks = self.marks.get(request_id)
        if marks is not None and processed_computed_tokens < marks.droppable:
            return
        for manager in self._droppers:
            manager.remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        if marks is not None and self._steady:
            marks.droppable = self._next_drop(processed_computed_tokens)

    def _find_next_drop(self, tokens: int) -> int:
        """Fewest computed tokens, above `tokens` and at most a block above it, that may make a page needless."""
        ahead = range(tokens + 1, tokens + 1 + self.scheduler_block_size)
        return ahead.start + min(
            (bisect_right(ahead, first_needed(tokens), key=first_needed) for first_needed in self._first_needed),
            default=len(ahead),
        )

    def free(self, request_id: str) -> None:
        """Release a request's blocks of all groups together, tail first (balanced and aligned eviction)."""
        self._release(self.pop_blocks_by_group(request_id))

    def _release(self, rows: Sequence[list[KVCacheBlock]]) -> None:
        """One reference less to each block, of rows by group."""
        self.allocator.tick()
        runs = [
            run
            for pool, size, blocks in zip(self.pools, self.group_block_sizes, rows, strict=True)
            for run in pool.drop_references(blocks, size)
        ]
        runs.sort(key=itemgetter(0), reverse=True)
        for _, group, pages, keep in runs:
            self.allocator.release_run(group, pages, keep)

    def pop_blocks_by_group(self, request_id: str) -> list[list[KVCacheBlock]]:
        """End a request's bookkeeping; its blocks, group by group."""
        self.marks.pop(request_id, None)
        return [manager.pop_blocks_for_free(request_id) for manager in self.single_type_managers]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks of all groups, merged by the token position where each ends."""
        placed = [
            ((index + 1) * size, group, block)
            for group, (size, blocks) in enumerate(
                zip(self.group_block_sizes, self.pop_blocks_by_group(request_id), strict=True)
            )
            for index, block in enumerate(blocks)
            if not block.is_null
        ]
        placed.sort(key=itemgetter(0, 1))
        return [block for _, _, block in placed]

    def new_step_starts(self) -> None:
        """A new scheduler step: what it releases is younger than what the last one released."""
        self.allocator.tick(int(monotonic() * CLOCK_HZ))
        for manager in self._stepping:
            manager.new_step_starts()

    def reset_prefix_cache(self) -> bool:
        """Forget everything cached, in all groups or none."""
        return bool(self.block_pool.reset_prefix_cache())

    def take_new_block_ids(self) -> list[int]:
        """Pages to zero, of all groups in one list: group ``g``'s ids are raised by ``id_offsets[g]``."""
        # A request that is preempted in the step that admitted it has given its new pages back.
        ids = self.part_ids(
            [
                [page for page in manager.take_new_block_ids() if pool.blocks[page].ref_cnt]
                for manager, pool in zip(self.single_type_managers, self.pools, strict=True)
            ]
        )
        return [
            offset + page for pages, offset in zip(ids, self.kv_cache_config.id_offsets, strict=True) for page in pages
        ]

    # -- debugging ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare block tables, reference counts and page states (O(pages)).

        Raises:
            AssertionError: they disagree; the message names group and page.
        """
        self.allocator.check()
        for group, (manager, pool) in enumerate(zip(self.single_type_managers, self.pools, strict=True)):
            held: dict[int, int] = {}
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    if not block.is_null:
                        held[block.block_id] = held.get(block.block_id, 0) + 1
            for block in pool.blocks[self.allocator.reserved * self.allocator.ratios[group] :]:
                page, state = block.block_id, self.allocator.state(group, block.block_id)
                assert block.ref_cnt >= held.get(page, 0), f"group {group} page {page}: more holders than references"
                assert (state is PageState.LIVE) == (block.ref_cnt > 0), f"group {group} page {page}: {state.name}"
                if state is PageState.CACHED:
                    assert block.block_hash is not None, f"group {group} page {page}: cached without a hash"
                if state is PageState.FREE:
                    assert block.block_hash is None, f"group {group} page {page}: free but findable"


class JengaNoPrefixCache(JengaCoordinator, vllm_coordinator.KVCacheCoordinatorNoPrefixCache):
    """Without prefix caching."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adopt()


class JengaPrefixCache(JengaCoordinator, vllm_coordinator.HybridKVCacheCoordinator):
    """With prefix caching: hits by the rule that router and simulator use too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_partial_hash_hits": False})
        self.adopt()
        managers = self.single_type_managers
        self._states = [g for g, m in enumerate(managers) if isinstance(m, StateManager)]
        dense = [
            (g, m.block_size)
            for g, (m, policy) in enumerate(zip(managers, self._policies, strict=True))
            if policy.token_pages and policy.resident_from(FAR, m.block_size) == 0
        ]
        self.chains = Chains(self.pools, dense) if dense else None
        self._spine = self.chains.spine if self.chains is not None else None
        for group in self._states:
            cast(StateManager, managers[group]).keeps = self._keeps
            self.pools[group].cached_block_hash_to_block = StateIndex()
        self._windows = [
            g
            for g, (m, policy) in enumerate(zip(managers, self._policies, strict=True))
            if g not in self._states and policy.resident_from(FAR, m.block_size) > 0
        ]
        self._answers = 0  # running requests with states kept for the end of their answer
        places = self.kv_cache_config.layout.groups
        self._state_pages = sum(places[g].parts / places[g].ratio for g in self._states)  # large pages of one's states
        options = self.kv_cache_config.checkpoints
        self.checkpoints = Checkpoints(options, self.scheduler_block_size, self.hash_block_size)

    def check(self) -> None:
        """The same, and that all that is cached can be reached, if nothing was evicted since the last `sweep`.

        Raises:
            AssertionError: it is not so; the message names group and page.
        """
        super().check()
        if self.chains is not None and not self.chains.lost:
            self.chains.check()

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[Blocks, int, int]:
        """The longest prefix that every group can resume.

        Returns:
            blocks to reuse by group (null blocks where a group needs none), the hit in tokens, and how many tokens
            further some group would have gone (a shared prefix worth a checkpoint).
        """
        hit, lookups = self._look_up(block_hashes, max_cache_hit_length)
        self._last_hit, self._looked_up = hit, max_cache_hit_length + 1
        self.checkpoints.learn(block_hashes, hit)
        if not hit.tokens:
            return tuple([] for _ in self.pools), 0, hit.furthest
        return self._blocks_of(hit, lookups), hit.tokens, hit.furthest - hit.tokens

    def _look_up(self, block_hashes: list[BlockHash], longest: int) -> tuple[Hit, list[_Lookup]]:
        """The hit of a prompt, at most `longest` tokens, without side effects."""
        lookups = [
            _Lookup(pool, group, resolve_block_hashes(block_hashes, self.hash_block_size, manager.block_size))
            for group, (pool, manager) in enumerate(zip(self.pools, self.single_type_managers, strict=True))
        ]
        caches = [
            GroupCache(policy, manager.block_size, lookup)
            for policy, manager, lookup in zip(self._policies, self.single_type_managers, lookups, strict=True)
        ]
        return longest_common_hit(caches, longest, self.scheduler_block_size), lookups

    def _blocks_of(self, hit: Hit, lookups: Sequence[_Lookup]) -> Blocks:
        """The blocks that a request resuming behind `hit` must hold, null blocks where a group needs none."""
        rows = []
        for policy, manager, lookup in zip(self._policies, self.single_type_managers, lookups, strict=True):
            pages = hit.tokens // manager.block_size
            row = [manager._null_block] * pages
            for page in policy.pages_of_hit(pages, manager.block_size):
                row[page] = lookup.block(page)
            rows.append(row)
        return tuple(rows)

    def refresh(self, block_hashes: list[BlockHash], longest: int) -> None:
        """A request of this prompt waits: what it will find counts as used now, and is evicted after all else.

        `longest` is the most tokens that it may find.
        """
        hit, lookups = self._look_up(block_hashes, longest)
        if hit.tokens:
            rows = self._blocks_of(hit, lookups)
            for pool, row in zip(self.pools, rows, strict=True):
                pool.touch(row)
            self._release(rows)

    # -- what is kept for later requests --------------------------------------------------------------------

    def _cache_pages(self, request: Request, num_computed_tokens: int) -> None:
        """Cache full pages: all that full attention has, of windows and states those that hits at a boundary need."""
        kept = self.checkpoints.of(request)
        kept.computed = num_computed_tokens
        lengths = (request.num_prompt_tokens - 1, *kept.boundaries.lengths)
        answer = self._ends_answer(kept, num_computed_tokens)
        for group, manager in enumerate(self.single_type_managers):
            keeps = answer and isinstance(manager, StateManager)
            manager.cache_blocks(
                request,
                self.get_num_cacheable_tokens(num_computed_tokens, group),
                retention_interval=self.retention_interval,
                replay_boundaries=(*lengths, num_computed_tokens) if keeps else lengths,
            )
        if answer:
            self._replace_answer(kept)

    def sweep(self, most: int = 0) -> None:
        """Free what no hit can get to any more, if more than `most` pages were evicted since it was done last."""
        if self.chains is not None and len(self.chains.lost) > most:
            self.chains.sweep()

    def reset_prefix_cache(self) -> bool:
        """Forget everything cached, in all groups or none."""
        done = super().reset_prefix_cache()
        if done and self.chains is not None:
            self.chains.clear()
        return done

    def _ends_answer(self, kept: Kept, tokens: int) -> bool:
        """Whether the states at `tokens` are kept as the end of the answer so far."""
        return (
            self.kv_cache_config.checkpoints.answers
            and self.retention_interval == 0
            and tokens % self.scheduler_block_size == 0
            and tokens > kept.prompt_end
            and (self._answers + (not kept.states)) * self._state_pages <= ANSWER_SHARE * self.allocator.available
        )

    def _replace_answer(self, kept: Kept) -> None:
        """Remember the states just kept, and forget those of an earlier end, unless someone uses them.

        So a running answer has one state more than it works on.
        """
        self._answers -= bool(kept.states)
        for pool, block, block_hash in kept.states:
            if block.ref_cnt == 0 and block.block_hash == block_hash:
                pool.uncache(block, "replaced")
        kept.answer = kept.computed
        kept.states = []
        for group in self._states:
            manager = self.single_type_managers[group]
            block = manager.req_to_blocks[kept.request.request_id][kept.computed // manager.block_size - 1]
            if block.block_hash is None:  # moved on before it could be kept
                kept.answer, kept.states = 0, []
                break
            kept.states.append((manager.block_pool, block, block.block_hash))
        self._answers += bool(kept.states)

    def _keeps(self, request_id: str, tokens: int) -> bool:
        """Whether the states at `tokens` tokens of a running request are to be kept."""
        kept = self.checkpoints.requests.get(request_id)
        return kept is not None and (tokens in kept.boundaries.lengths or self._ends_answer(kept, tokens))

    def pop_blocks_by_group(self, request_id: str) -> list[list[KVCacheBlock]]:
        """The request's blocks, with the states and windows at the end of its answer."""
        kept = self.checkpoints.requests.pop(request_id, None)
        self._answers -= kept is not None and bool(kept.states)
        if kept is not None and self.kv_cache_config.checkpoints.answers:
            self._keep_answer(kept, kept.computed - kept.computed % self.scheduler_block_size)
        rows = super().pop_blocks_by_group(request_id)
        if self.chains is not None and self._spine is not None:
            self.chains.ends(rows[self._spine])
        return rows

    def _keep_answer(self, kept: Kept, end: int) -> None:
        """Keep what a hit of `end` tokens, the last full block of a request, needs: the next turn resumes there."""
        request = kept.request
        if end <= kept.prompt_end or (kept.answer != end and self._states):
            return
        if any(block.block_hash != block_hash for _, block, block_hash in kept.states):
            return  # evicted
        windows = []
        for group in self._windows:
            manager = self.single_type_managers[group]
            pages = self._policies[group].pages_of_hit(end // manager.block_size, manager.block_size)
            blocks = manager.req_to_blocks[request.request_id]
            if any(block.is_null for block in blocks[pages.start : pages.stop]):
                return  # dropped
            windows.append((group, manager, pages, blocks))
        for group, manager, pages, blocks in windows:
            manager.block_pool.cache_full_blocks(
                request=request,
                blocks=blocks,
                num_cached_blocks=pages.start,
                num_full_blocks=pages.stop,
                block_size=manager.block_size,
                kv_cache_group_id=group,
                block_mask=[block.block_hash is None for block in blocks[pages.start : pages.stop]],
            )
        # The states were left behind: held once more, they are released in order and as old as the rest.
        for group, (pool, block, _) in zip(self._states, kept.states, strict=True):
            if block.ref_cnt == 0:
                pool.touch([block])
                manager = self.single_type_managers[group]
                manager.req_to_blocks[request.request_id][end // manager.block_size - 1] = block


class _Lookup:
    """Answers whether page ``i`` of one prompt is cached in one group, each page looked up once."""

    __slots__ = ("_find", "_found", "_group", "_hashes")

    def __init__(self, pool: GroupPool, group: int, hashes: Sequence[BlockHash] | BlockHashListWithBlockSize) -> None:
        self._find = pool.cached_block_hash_to_block.get_one_block
        self._group = group
        self._hashes = hashes
        self._found: dict[int, KVCacheBlock | None] = {}

    def __call__(self, page: int) -> bool:
        found = self._found
        if page not in found:
            found[page] = self._find(make_block_hash_with_group_id(self._hashes[page], self._group))
        return found[page] is not None

    def block(self, page: int) -> KVCacheBlock:
        """The cached block of a page that was found."""
        block = self._found[page]
        assert block is not None
        return block


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `get_kv_cache_coordinator` that serves Jenga's configurations and passes others to `original`."""

    def get_kv_cache_coordinator(
        kv_cache_config: Any,
        max_model_len: int,
        max_in_flight_tokens: int,
        use_eagle: bool,
        enable_caching: bool,
        enable_kv_cache_events: bool,
        **options: Any,
    ) -> Any:
        if not isinstance(kv_cache_config, JengaKVCacheConfig):
            return original(
                kv_cache_config,
                max_model_len,
                max_in_flight_tokens,
                use_eagle,
                enable_caching,
                enable_kv_cache_events,
                **options,
            )
        options.pop("allow_partial_hash_hits", None)
        common = (kv_cache_config, max_model_len, max_in_flight_tokens, use_eagle)
        if enable_caching:
            return JengaPrefixCache(*common, enable_caching, enable_kv_cache_events, **options)
        return JengaNoPrefixCache(*common, enable_kv_cache_events, **options)

    return get_kv_cache_coordinator
