"""Questions of the memory map to a running engine core (`jenga.metrics.map`).

Asked only while somebody looks, and answered between two steps: the map is a copy of a few arrays, the contents of a
large page cost one look at every running request.
"""

from __future__ import annotations

import time
from typing import Any, Literal

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
    size, found = manager.block_size, dict[int, list[tuple[str, int]]]()
    tables = manager.req_to_blocks
    for page in pages:
        block = pool.blocks[page]
        if block.block_hash_num_tokens is not None:
            index = (block.block_hash_num_tokens - 1) // size
            holders = [(who, index) for who, row in tables.items() if index < len(row) and row[index] is block]
            found[page] = holders
    missing = {page: pool.blocks[page].ref_cnt for page in pages}
    missing = {page: count for page, count in missing.items() if len(found.get(page, ())) < count}
    found.update({page: [] for page in missing})
    for who, row in tables.items() if missing else ():
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


def _coordinator(scheduler: Any) -> JengaCoordinator | None:
    coordinator = scheduler.kv_cache_manager.coordinator
    return coordinator if isinstance(coordinator, JengaCoordinator) else None
