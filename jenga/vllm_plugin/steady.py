"""Steps that change no block table of a request, told by three numbers.

Most steps of a decode add one token to pages that are there: nothing to allocate, cache or drop.  vLLM finds that out
anew in every manager, step by step; here a request's `Marks` say up to where it is so.  Where pages are to be cached or
dropped, but none is missing, that is all that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request


class Marks:
    """How far a running request can go before a block table of its changes; numbers of tokens."""

    __slots__ = ("cacheable", "droppable", "slots")

    def __init__(self) -> None:
        self.slots = 0
        """Tokens that have a slot in every group."""
        self.cacheable = 0
        """Fewest tokens at which there may be something more to cache."""
        self.droppable = 0
        """Fewest tokens at which there may be something more to drop."""


def is_steady(manager: SingleTypeKVCacheManager) -> bool:
    """Whether `manager` changes a running request's block table at page boundaries only."""
    if isinstance(manager, MambaManager):
        return not manager.num_speculative_blocks
    return type(manager) in (FullAttentionManager, SlidingWindowManager, ChunkedLocalAttentionManager)


def skipping(manager: Any, marks: Mapping[str, Marks]) -> Callable[..., KVCacheBlocks | None]:
    """`KVCacheManager.allocate_slots`, which for a request short of its marks has little or nothing to do."""
    allocate_slots: Callable[..., KVCacheBlocks | None] = manager.allocate_slots
    coordinator, caching = manager.coordinator, manager.enable_caching
    nothing: KVCacheBlocks = manager.empty_kv_cache_blocks

    def quick_allocate_slots(
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        **options: Any,
    ) -> KVCacheBlocks | None:
        reach = marks.get(request.request_id)
        if reach is not None:
            computed = request.num_computed_tokens
            tokens = computed + num_new_tokens
            if tokens + num_lookahead_tokens <= reach.slots and not options:
                if computed >= reach.droppable:
                    coordinator.remove_skipped_blocks(
                        request.request_id, max(0, computed - request.num_in_flight_tokens), request.num_prompt_tokens
                    )
                if caching and tokens >= reach.cacheable:
                    coordinator.cache_blocks(request, min(tokens, request.num_tokens))
                return nothing
        return allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, num_lookahead_tokens, **options
        )

    return quick_allocate_slots


def install() -> None:
    """Let every KVCacheManager whose coordinator has marks look at them first."""
    original = KVCacheManager.__init__

    @wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        marks = getattr(self.coordinator, "marks", None)
        if marks is not None:
            self.allocate_slots = skipping(self, marks)

    setattr(KVCacheManager, "__init__", initialise)  # noqa: B010
