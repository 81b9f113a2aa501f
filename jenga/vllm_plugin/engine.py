"""Questions to a running engine core: what its memory holds."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.engine.core import EngineCore

from jenga.metrics.engine import EngineReport, RequestCounts, StockUse, eviction_ages
from jenga.metrics.memory import MemorySnapshot, memory_snapshot
from jenga.vllm_plugin.coordinator import JengaCoordinator
from jenga.vllm_plugin.counters import StateIndex
from jenga.vllm_plugin.residency import Residency, residency, stored_tokens

__all__ = ["install", "jenga_memory", "report", "stored_tokens"]


def install() -> None:
    """Give EngineCore the utility `jenga_memory`; front ends call it like vLLM's own utilities."""
    setattr(EngineCore, "jenga_memory", jenga_memory)  # noqa: B010


def jenga_memory(self: EngineCore) -> dict[str, Any] | None:
    """`EngineReport` as plain data, None if vLLM's own manager is in charge.

    Asked for at the reader's pace (every `jenga.metrics.engine.PERIOD`), so that scheduler steps pay nothing for it.
    """
    scheduler: Any = self.scheduler
    coordinator = scheduler.kv_cache_manager.coordinator
    return report(coordinator, scheduler).to_dict() if isinstance(coordinator, JengaCoordinator) else None


def report(coordinator: JengaCoordinator, scheduler: Any) -> EngineReport:
    """The engine now; O(requests)."""
    config, allocator = coordinator.kv_cache_config, coordinator.allocator
    usage = allocator.usage()
    resident = residency(coordinator, scheduler, usage)
    memory = memory_snapshot(config.layout, usage, config.kv_cache_tensors[0].size, resident.uses)
    indices = [pool.cached_block_hash_to_block for pool in coordinator.pools]
    return EngineReport(
        time=time.time(),
        memory=memory,
        counters=allocator.counters(),
        hits=coordinator.hits,
        requests=RequestCounts(
            resident=len(coordinator.marks),
            waiting=scheduler.get_request_counts()[1],
            admissions_refused=tuple(coordinator.refusals.admissions),
            growths_refused=tuple(coordinator.refusals.growths),
        ),
        page_tokens=tuple(place.group.page_tokens for place in config.layout.groups),
        ages=eviction_ages(allocator),
        checkpoints=tuple(index.totals() if isinstance(index, StateIndex) else None for index in indices),
        stock=_stock(coordinator, resident, memory),
    )


def _stock(coordinator: JengaCoordinator, resident: Residency, memory: MemorySnapshot) -> StockUse | None:
    plan = coordinator.kv_cache_config.stock
    if plan is None:
        return None
    held = plan.held_bytes(resident.lengths, resident.shared, resident.encoder_tokens)
    return StockUse(held, max(0, held - sum(group.needed_bytes for group in memory.groups)))
