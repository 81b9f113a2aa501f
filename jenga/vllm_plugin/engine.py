"""Questions to a running engine core: what its memory holds."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import CrossAttentionManager, SingleTypeKVCacheManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from jenga.metrics.engine import EngineReport
from jenga.metrics.memory import LiveUse, memory_snapshot
from jenga.vllm_plugin.coordinator import JengaCoordinator


def install() -> None:
    """Give EngineCore the utility `jenga_memory`; front ends call it like vLLM's own utilities."""
    setattr(EngineCore, "jenga_memory", jenga_memory)  # noqa: B010


def jenga_memory(self: EngineCore) -> dict[str, Any] | None:
    """`EngineReport` as plain data, None if vLLM's own manager is in charge.

    Asked for at the reader's pace (once a second or less), so that scheduler steps pay nothing for it.
    """
    scheduler: Any = self.scheduler
    coordinator = scheduler.kv_cache_manager.coordinator
    if not isinstance(coordinator, JengaCoordinator):
        return None
    config = coordinator.kv_cache_config
    memory = memory_snapshot(
        config.layout, coordinator.allocator.usage(), config.kv_cache_tensors[0].size, live_use(coordinator, scheduler)
    )
    return EngineReport(memory, coordinator.allocator.counters(), coordinator.hits).to_dict()


def live_use(coordinator: JengaCoordinator, scheduler: Any) -> list[LiveUse]:
    """What running requests do with their pages, by group; a page that several share counts once, as needed."""
    uses = []
    requests = [r for r in scheduler.requests.values() if r.num_computed_tokens]
    for index, (manager, place) in enumerate(
        zip(coordinator.single_type_managers, coordinator.kv_cache_config.layout.groups, strict=True)
    ):
        policy, size = place.group.policy, place.group.page_tokens
        needed: set[int] = set()
        held: set[int] = set()
        empty = 0
        for request in requests:
            tokens = stored_tokens(manager, request)
            start = policy.resident_from(tokens, size)
            blocks = manager.req_to_blocks.get(request.request_id, ())
            for position, block in enumerate(blocks):
                if block.is_null or block.block_id in needed:
                    continue
                held.add(block.block_id)
                if position >= start:
                    needed.add(block.block_id)
                    empty += min(size, max(0, (position + 1) * size - tokens))
        uses.append(LiveUse(group=index, held=len(held), needed=len(needed), empty_tokens=empty))
    return uses


def stored_tokens(manager: SingleTypeKVCacheManager, request: Request) -> int:
    """Tokens of a request that a group stores something for."""
    if isinstance(manager, CrossAttentionManager):
        return sum(request.get_num_encoder_embeds(i) for i in range(request.num_encoder_inputs))
    return int(request.num_computed_tokens)
