"""What a coordinator counts besides hits: refusals of memory, and recurrent states kept for later requests."""

from __future__ import annotations

from collections.abc import KeysView, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

from jenga.allocator import TwoLevelAllocator
from jenga.metrics.definitions import CHECKPOINT_CAUSES
from jenga.metrics.engine import CheckpointTotals


class Refusals:
    """Requests that memory was refused to, by the group that asked for most of the large pages."""

    def __init__(self, allocator: TwoLevelAllocator) -> None:
        self._allocator = allocator
        self._waiting: str | None = None
        groups = len(allocator.ratios)
        self.admissions = [0] * groups
        """Refused while waiting; asking again and again counts once."""
        self.growths = [0] * groups
        """Refused while running."""

    def refuse(self, request_id: str, running: bool, pages: Sequence[int], pins: Sequence[Sequence[int]]) -> None:
        """`request_id`, which asked for `pages` and holds `pins` through a hit, does not get them."""
        if not running:
            if request_id == self._waiting:
                return
            self._waiting = request_id
        (self.growths if running else self.admissions)[self._greediest(pages, pins)] += 1

    def admitted(self, request_id: str) -> None:
        """If it is refused again, that is another wait."""
        if request_id == self._waiting:
            self._waiting = None

    def _greediest(self, pages: Sequence[int], pins: Sequence[Sequence[int]]) -> int:
        groups = range(len(pages))

        def alone(group: int) -> int:
            return self._allocator.large_pages_needed(
                [n if g == group else 0 for g, n in enumerate(pages)],
                [p if g == group else [] for g, p in enumerate(pins)],
            )

        return max(groups, key=alone)


class PageIndex(BlockHashToBlockMap):
    """The findable pages of one group."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cause = "evicted"
        """Why pages that go now are dropped (one of `CHECKPOINT_CAUSES`)."""

    @property
    def names(self) -> KeysView[BlockHashWithGroupId]:
        """Names that some page has."""
        return self._cache.keys()

    def copies(self, key: BlockHashWithGroupId) -> list[KVCacheBlock]:
        """All pages with this name."""
        found: Any = self._cache.get(key, ())
        return [found] if isinstance(found, KVCacheBlock) else list(found.values()) if found else []

    def clear(self) -> None:
        """Forget all of them."""
        self._cache.clear()


class StateIndex(PageIndex):
    """The findable states of one group, counted as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        self.dropped = dict.fromkeys(CHECKPOINT_CAUSES, 0)

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        """One more findable state."""
        self.made += 1
        super().insert(key, block)

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> Any:
        """One less, if it is there."""
        found = super().pop(key, block_id)
        self.dropped[self.cause] += found is not None
        return found

    def clear(self) -> None:
        """Forget all of them: a reset."""
        self.dropped["reset"] += self.kept
        super().clear()

    @property
    def kept(self) -> int:
        """Findable now."""
        return self.made - sum(self.dropped.values())

    def totals(self) -> CheckpointTotals:
        """For the engine's report."""
        return CheckpointTotals(self.kept, self.made, tuple(self.dropped.values()))
