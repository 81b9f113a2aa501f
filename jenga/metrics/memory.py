"""Where the KV buffer's bytes are, by cause: parts that sum exactly to the buffer.

Every byte is counted once.  A group's small pages are live, cached or stranded; padding is split off from live and
cached pages, and what live requests hold is split into needed, tail and droppable.  All else belongs to the pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from jenga.allocator import GroupUsage, Usage
from jenga.layout import GroupLayout, Layout

SCHEMA_VERSION = 1
"""Raised whenever a field changes its meaning or goes away."""

GROUP_CAUSES = ("needed", "tail", "droppable", "cached", "padding", "stranded")
POOL_CAUSES = ("reserved", "free", "remainder")
LIVE_CAUSES = ("needed", "tail", "droppable")
"""Those that live requests account for."""


@dataclass(frozen=True)
class LiveUse:
    """What one sequence (or several added up: all fields are additive) does with its live pages of one group.

    A page that several sequences share is counted by one of them only, and as needed if any of them needs it.
    """

    group: int
    """Index of the group."""
    held: int
    """Live small pages held."""
    needed: int
    """Pages of `held` whose contents a coming token still reads or writes; the rest could be dropped now."""
    empty_tokens: int = 0
    """Token places of the needed pages that hold no token (yet); ignored where a page is one state."""


@dataclass(frozen=True)
class GroupMemory:
    """One group.  The six ``*_bytes`` sum to ``large_pages * large_page_bytes``; pages of unlike groups do not add."""

    name: str
    kind: str
    """Layer type."""
    large_pages: int
    """Large pages the group owns; sums over groups."""
    live_pages: int
    """Small pages in use; with `cached_pages` and `stranded_pages` it sums to the group's slots."""
    cached_pages: int
    """Small pages that only the prefix cache holds."""
    stranded_pages: int
    """Free small pages inside large pages that the group owns."""
    needed_bytes: int
    """Contents that live requests still need; sums with every other ``*_bytes``, here and over groups."""
    tail_bytes: int
    """Token places of needed pages that hold no token."""
    droppable_bytes: int
    """Held by live requests though no coming token needs it."""
    cached_bytes: int
    """Reusable contents of pages that no request holds."""
    padding_bytes: int
    """Unused end of live and cached pages: the distance between pages less the page itself."""
    stranded_bytes: int
    """Whole free slots, their padding included, that only this group can use."""


@dataclass(frozen=True)
class MemorySnapshot:
    """The buffer at one moment: the causes of all groups and of the pool sum exactly to `buffer_bytes`."""

    schema_version: int
    buffer_bytes: int
    """The whole KV buffer; sums over engines."""
    large_page_bytes: int
    large_pages: int
    """All large pages: `free_large_pages` + `reserved_large_pages` + those of the groups."""
    free_large_pages: int
    reserved_large_pages: int
    evictable_large_pages: int
    """Groups' large pages that hold nothing live.  A part of theirs: never add it to them."""
    reserved_bytes: int
    """Large pages never granted (the null page); sums with every cause."""
    free_bytes: int
    """Large pages that nobody owns; sums with every cause."""
    remainder_bytes: int
    """End of the buffer that no large page covers; sums with every cause."""
    groups: tuple[GroupMemory, ...]

    def by_cause(self) -> dict[str, int]:
        """Bytes by cause over all groups and the pool; the values sum to `buffer_bytes`."""
        causes = {cause: sum(getattr(g, f"{cause}_bytes") for g in self.groups) for cause in GROUP_CAUSES}
        return causes | {cause: getattr(self, f"{cause}_bytes") for cause in POOL_CAUSES}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and between processes."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemorySnapshot:
        """The inverse of `to_dict`.

        Raises:
            ValueError: written under another schema version.
        """
        check_schema(data)
        return msgspec.convert(data, cls)


def check_schema(data: object) -> None:
    """Refuse a snapshot that another version wrote.

    Raises:
        ValueError: names both versions.
    """
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"memory snapshot has schema version {version!r}, this is {SCHEMA_VERSION}: "
            "run the same version of jenga-serve on both sides"
        )


def memory_snapshot(layout: Layout, usage: Usage, buffer_bytes: int, live: Iterable[LiveUse] = ()) -> MemorySnapshot:
    """Split a buffer of `buffer_bytes` bytes by cause.

    Live pages that no fact in `live` speaks of count as needed and full.

    Raises:
        ValueError: the arguments contradict each other; the message names the group or size.
    """
    if len(usage.groups) != len(layout.groups):
        raise ValueError(f"the pool has {len(usage.groups)} groups, the layout {len(layout.groups)}")
    remainder = buffer_bytes - usage.large_pages * layout.large_page_bytes
    if remainder < 0:
        raise ValueError(
            f"{usage.large_pages} large pages of {layout.large_page_bytes} bytes "
            f"exceed the buffer of {buffer_bytes} bytes"
        )
    totals = _add_up(live, len(layout.groups))
    return MemorySnapshot(
        schema_version=SCHEMA_VERSION,
        buffer_bytes=buffer_bytes,
        large_page_bytes=layout.large_page_bytes,
        large_pages=usage.large_pages,
        free_large_pages=usage.free,
        reserved_large_pages=usage.reserved,
        evictable_large_pages=usage.evictable,
        reserved_bytes=usage.reserved * layout.large_page_bytes,
        free_bytes=usage.free * layout.large_page_bytes,
        remainder_bytes=remainder,
        groups=tuple(_group(*parts) for parts in zip(layout.groups, usage.groups, totals, strict=True)),
    )


def _add_up(live: Iterable[LiveUse], groups: int) -> list[LiveUse]:
    sums = [[0, 0, 0] for _ in range(groups)]
    for use in live:
        if not 0 <= use.group < groups:
            raise ValueError(f"{use} names a group that is not there; groups are 0 to {groups - 1}")
        if not 0 <= use.needed <= use.held or use.empty_tokens < 0:
            raise ValueError(f"{use}: needed pages are a part of those held, and no count is negative")
        total = sums[use.group]
        total[0] += use.held
        total[1] += use.needed
        total[2] += use.empty_tokens
    return [LiveUse(index, *total) for index, total in enumerate(sums)]


def _group(place: GroupLayout, usage: GroupUsage, use: LiveUse) -> GroupMemory:
    group = place.group
    if use.held > usage.live:
        raise ValueError(
            f"group {group.name}: sequences hold {use.held} pages, but only {usage.live} are live "
            "(count a shared page once)"
        )
    empty = use.empty_tokens if group.policy.token_pages else 0
    if empty > use.needed * group.page_tokens:
        raise ValueError(f"group {group.name}: {empty} empty token places in {use.needed} pages of {group.page_tokens}")
    droppable = use.held - use.needed
    tail = group.page_bytes * empty // group.page_tokens
    return GroupMemory(
        name=group.name,
        kind=group.policy.kind,
        large_pages=usage.large_pages,
        live_pages=usage.live,
        cached_pages=usage.cached,
        stranded_pages=usage.stranded,
        needed_bytes=(usage.live - droppable) * group.page_bytes - tail,
        tail_bytes=tail,
        droppable_bytes=droppable * group.page_bytes,
        cached_bytes=usage.cached * group.page_bytes,
        padding_bytes=(usage.live + usage.cached) * place.padding,
        stranded_bytes=usage.stranded * place.stride,
    )
