"""Questions of the memory map to a running engine core (`jenga.metrics.map`).

Asked only while somebody looks, and answered between two steps: the map is a copy of a few arrays, the contents of a
large page cost one look at every running request.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from itertools import compress
from operator import is_, itemgetter
from typing import Any, Literal

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine.core import EngineCore

from jenga.allocator import CLOCK_HZ, PageState
from jenga.metrics.map import LargePage, MemoryMap, SmallPage
from jenga.vllm_plugin.coordinator import JengaCoordinator
from jenga.vllm_plugin.engine import stored_tokens
from jenga.vllm_plugin.pool import GroupPool

_STATES: dict[PageState, Literal["live", "cached", "free"]] = {
    PageState.LIVE: "live",
    PageState.CACHED: "cached",
    PageState.FREE: "free",
}


def install() -> None:
    """Give EngineCore the map's utilities; front ends call them like vLLM's own."""
    for function in (jenga_map, jenga_large_page):
        setattr(EngineCore, function.__name__, function)


def jenga_map(self: EngineCore) -> dict[str, Any] | None:
    """`MemoryMap` as plain data, None if vLLM's own manager is in charge."""
    coordinator = _coordinator(self.scheduler)
    if coordinator is None:
        return None
    return MemoryMap.take(coordinator.kv_cache_config.layout, coordinator.allocator, time.time()).to_dict()


def jenga_large_page(self: EngineCore, large: int) -> dict[str, Any] | None:
    """`LargePage` as plain data; None if vLLM's own manager is in charge, or there is no such page."""
    coordinator = _coordinator(self.scheduler)
    if coordinator is None or not 0 <= large < coordinator.allocator.large_pages:
        return None
    return large_page(coordinator, self.scheduler, large, time.monotonic()).to_dict()


def large_page(coordinator: JengaCoordinator, scheduler: Any, large: int, now: float) -> LargePage:
    """What is in a large page at `now`, in seconds of the monotonic clock."""
    allocator = coordinator.allocator
    group = allocator.owner(large)
    if large < allocator.reserved:
        return LargePage(large, "reserved", None, (SmallPage(0, "null"),))
    if group is None:
        return LargePage(large, "free", None, ())
    place = coordinator.kv_cache_config.layout.groups[group]
    pool, manager, size = coordinator.pools[group], coordinator.single_type_managers[group], place.group.page_tokens
    lead = allocator.lead(large)  # a page in several parts is booked under the first
    released = allocator.released(lead)
    numbers = range(lead * place.ratio, (lead + 1) * place.ratio)
    states = {page: allocator.state(group, page) for page in numbers}
    held = _holders(manager, pool, [page for page, state in states.items() if state is PageState.LIVE])

    def small(page: int) -> SmallPage:
        state = states[page]
        if state is PageState.FREE:
            return SmallPage(page, "free")
        end = pool.blocks[page].block_hash_num_tokens  # a page that can be found says where it belongs
        begin = None if end is None else (end - 1) // size * size
        holders = held.get(page, [])
        if end is None and holders:
            request_id, index = holders[0]
            request = scheduler.requests.get(request_id)
            begin = end = index * size
            if request is not None:
                end = max(begin, min(begin + size, stored_tokens(manager, request)))
        unused = max(0.0, now - released[page] / CLOCK_HZ) if page in released else 0.0
        owners = tuple(request_id for request_id, _ in holders)
        return SmallPage(page, _STATES[state], owners, begin, end, round(unused, 1))

    return LargePage(large, "owned", place.group.name, tuple(map(small, numbers)))


def _holders(manager: SingleTypeKVCacheManager, pool: GroupPool, pages: list[int]) -> dict[int, list[tuple[str, int]]]:
    """Requests that hold these live pages, each with the page's index in the request's table.

    Most pages know their index by their hash, which spares the search of every table.
    """
    found = _found_by_index(manager, [pool.blocks[page] for page in pages])
    missing = {page: pool.blocks[page].ref_cnt for page in pages}
    missing = {page: count for page, count in missing.items() if len(found.get(page, ())) < count}
    found.update({page: [] for page in missing})
    for who, row in manager.req_to_blocks.items() if missing else ():
        numbers = [block.block_id for block in row]
        if missing.keys().isdisjoint(numbers):
            continue
        for index, page in enumerate(numbers):
            if page in missing:
                found[page].append((who, index))
        missing = {page: count for page, count in missing.items() if len(found[page]) < count}
        if not missing:
            break
    return found


def _found_by_index(
    manager: SingleTypeKVCacheManager, blocks: Iterable[KVCacheBlock]
) -> dict[int, list[tuple[str, int]]]:
    """Holders of those pages that know their index, which is the same in every table."""
    size = manager.block_size
    wanted = [((end - 1) // size, block) for block in blocks if (end := block.block_hash_num_tokens) is not None]
    wanted.sort(key=itemgetter(0))
    found = {block.block_id: list[tuple[str, int]]() for _, block in wanted}
    indices, sought = [index for index, _ in wanted], [block for _, block in wanted]
    for who, row in manager.req_to_blocks.items():
        # A large page may have hundreds of pages, and most tables none of them: no loop of Python's over both.
        within = indices[: bisect_left(indices, len(row))]
        if not within:
            continue
        there = itemgetter(*within)(row) if len(within) > 1 else (row[within[0]],)
        held = list(compress(range(len(within)), map(is_, sought, there)))
        if not held:
            continue
        for at in held:
            found[sought[at].block_id].append((who, indices[at]))
        short = [len(found[block.block_id]) < block.ref_cnt for block in sought]
        indices, sought = list(compress(indices, short)), list(compress(sought, short))
        if not sought:
            break
    return found


def _coordinator(scheduler: Any) -> JengaCoordinator | None:
    coordinator = scheduler.kv_cache_manager.coordinator
    return coordinator if isinstance(coordinator, JengaCoordinator) else None
