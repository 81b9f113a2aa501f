"""What resident requests do with their pages, found out in little time: no walk over block tables.

A request's block table is null blocks for what was dropped, and behind them pages up to the last token.  So its length
and the block before the first that is still needed tell all, and groups with the same policy and page size are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CrossAttentionManager, SingleTypeKVCacheManager
from vllm.v1.request import Request

from jenga.allocator import Usage
from jenga.metrics.memory import LiveUse
from jenga.policies import LayerPolicy
from jenga.vllm_plugin.coordinator import FAR, JengaCoordinator


@dataclass(frozen=True)
class Residency:
    """Requests that hold pages."""

    lengths: list[int]
    """Computed tokens of each."""
    encoder_tokens: int
    """Stored for encoder inputs, of all."""
    uses: list[LiveUse]
    """By group; a page that several share counts once, as needed if any of them needs it."""
    shared: dict[LayerPolicy, int]
    """Tokens in pages that are shared, counted once for each holder but one."""


def residency(coordinator: JengaCoordinator, scheduler: Any, usage: Usage) -> Residency:
    """The present one, where the pool is in the state `usage`; O(requests)."""
    layout, managers = coordinator.kv_cache_config.layout, coordinator.single_type_managers
    live = [group.live for group in usage.groups]
    requests = [r for r in scheduler.requests.values() if r.num_computed_tokens and r.request_id in coordinator.marks]
    lengths = [r.num_computed_tokens for r in requests]
    encoder_tokens = 0
    uses: list[LiveUse] = []
    shared: dict[LayerPolicy, int] = {}
    classes: dict[tuple[LayerPolicy, int], _Tables] = {}
    for index, (manager, place) in enumerate(zip(managers, layout.groups, strict=True)):
        policy, size = place.group.policy, place.group.page_tokens
        tables = [manager.req_to_blocks[r.request_id] for r in requests]
        if not policy.token_pages:
            needed = {b for t, n in zip(tables, lengths, strict=True) for b in _held(t, policy.resident_from(n, size))}
            uses.append(LiveUse(group=index, held=live[index], needed=len(needed)))
            continue
        found = classes.get((policy, size))
        if found is None:
            tokens = lengths
            if isinstance(manager, CrossAttentionManager):
                tokens = [stored_tokens(manager, r) for r in requests]
                encoder_tokens = sum(tokens)
            found = classes[policy, size] = _Tables(tables, tokens, policy, size)
        droppable, references = found.droppable(tables)
        uses.append(
            LiveUse(group=index, held=live[index], needed=live[index] - droppable, empty_tokens=found.empty_tokens)
        )
        shared[policy] = min(shared.get(policy, FAR), max(0, references - live[index]) * size)
    return Residency(lengths, encoder_tokens, uses, shared)


def stored_tokens(manager: SingleTypeKVCacheManager, request: Request) -> int:
    """Tokens of a request that a group stores something for."""
    if isinstance(manager, CrossAttentionManager):
        return sum(request.get_num_encoder_embeds(i) for i in range(request.num_encoder_inputs))
    return int(request.num_computed_tokens)


class _Tables:
    """What block tables of one policy and page size have in common, whatever the group."""

    def __init__(
        self, tables: Sequence[list[KVCacheBlock]], tokens: Sequence[int], policy: LayerPolicy, size: int
    ) -> None:
        sizes = list(map(len, tables))
        # Where a table is not as long as its tokens (nothing is stored yet), nothing of it is empty.
        self.empty_tokens = sum(n * size - t for n, t in zip(sizes, tokens, strict=True) if n * size > t)
        self._references = sum(sizes)
        self._late: list[tuple[int, range]] = []  # tables, and their pages that could be dropped
        if policy.resident_from(FAR, size) == 0:
            return
        starts = [policy.resident_from(t, size) for t in tokens]
        for number, (table, start) in enumerate(zip(tables, starts, strict=True)):
            if not start:
                continue
            first = min(start, len(table))
            end = first
            while first and not table[first - 1].is_null:
                first -= 1
            if first < end:
                self._late.append((number, range(first, end)))
            self._references -= first

    def droppable(self, tables: Sequence[list[KVCacheBlock]]) -> tuple[int, int]:
        """Pages of a group that nobody who holds them needs, and how often its pages are held."""
        pages = 0
        together: dict[int, int] = {}
        for number, late in self._late:
            table = tables[number]
            for position in late:
                block = table[position]
                if block.ref_cnt == 1:
                    pages += 1
                else:
                    holders = together[block.block_id] = together.get(block.block_id, 0) + 1
                    pages += holders == block.ref_cnt
        return pages, self._references


def _held(table: list[KVCacheBlock], start: int) -> list[int]:
    return [block.block_id for block in table[start:] if not block.is_null]
