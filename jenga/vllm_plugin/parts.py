"""Block ids of pages that are cut into parts.

Managers, pools and hits know pages of layer types; a vLLM group, with a block table of its own, is one part of a type's
pages.  All parts of a page come and go together, so the groups differ only in the ids that the workers are told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.engine.core import EngineCore

from jenga.allocator import TwoLevelAllocator


class PartIds:
    """From ids by layer type to ids by vLLM group, in `JengaGroupSpec`'s order."""

    def __init__(self, allocator: TwoLevelAllocator) -> None:
        self._parts = allocator.parts
        self._wide = [group for group, width in enumerate(allocator.widths) if width > 1]

    def __bool__(self) -> bool:
        return bool(self._wide)

    def __call__(self, ids: Sequence[list[int]]) -> tuple[list[int], ...]:
        """`ids` of the first parts, by type, and those of the others."""
        return (*ids, *chain.from_iterable(self._parts(group, ids[group])[1:] for group in self._wide))


@dataclass
class PartedBlocks(KVCacheBlocks):
    """Blocks by layer type, whose ids are asked for by vLLM group."""

    ids_of: PartIds

    def get_block_ids(  # type: ignore[override]  # vLLM overloads it
        self, allow_none: bool = False, *, group_ids: Sequence[int] | None = None
    ) -> tuple[list[int], ...] | None:
        """The ids of all groups, or of `group_ids`; None if `allow_none` and there are none."""
        if allow_none and not any(self.blocks):
            return None
        ids = self.ids_of([[block.block_id for block in row] for row in self.blocks])
        return ids if group_ids is None else tuple(ids[group] for group in group_ids)


def present(manager: Any) -> None:
    """Let a KVCacheManager hand out `PartedBlocks` if its pages have parts."""
    ids_of: PartIds | None = getattr(manager.coordinator, "part_ids", None)
    if not ids_of:
        return
    nothing = PartedBlocks(tuple(() for _ in manager.coordinator.single_type_managers), ids_of)

    def create_kv_cache_blocks(blocks: tuple[Any, ...]) -> KVCacheBlocks:
        return PartedBlocks(blocks, ids_of) if any(blocks) else nothing

    manager.empty_kv_cache_blocks = nothing
    manager.create_kv_cache_blocks = create_kv_cache_blocks


def install() -> None:
    """Let every KVCacheManager, and the engine core's answer about groups, speak of the groups that each side knows."""
    make = KVCacheManager.__init__

    @wraps(make)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        present(self)

    setattr(KVCacheManager, "__init__", initialise)  # noqa: B010
    setattr(EngineCore, "get_kv_cache_group_metadata", groups_of_events(EngineCore.get_kv_cache_group_metadata))  # noqa: B010


class _Instead:
    """An object with some attributes replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self._original = original
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def groups_of_events(original: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineCore.get_kv_cache_group_metadata`, for readers of events: of a type's groups, the one that events name."""

    @wraps(original)
    def get_kv_cache_group_metadata(self: Any) -> Any:
        scheduler = self.scheduler
        coordinator: Any = getattr(getattr(scheduler, "kv_cache_manager", None), "coordinator", None)
        if not getattr(coordinator, "part_ids", None):
            return original(self)
        config = _Instead(
            scheduler.kv_cache_config,
            kv_cache_groups=scheduler.kv_cache_config.kv_cache_groups[: len(coordinator.single_type_managers)],
        )
        return original(_Instead(self, scheduler=_Instead(scheduler, kv_cache_config=config)))

    return get_kv_cache_group_metadata
