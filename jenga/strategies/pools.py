"""What simulators and engines ask of a pool of pages, and the pools of the strategies that are not two-level."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

from jenga.allocator import (
    Counters,
    EvictCallback,
    GroupUsage,
    OutOfPagesError,
    PageError,
    PageState,
    TwoLevelAllocator,
    Usage,
)
from jenga.strategies.runs import FreeRuns


class Pool(Protocol):
    """Grants, keeps and evicts pages of several groups; `jenga.allocator.TwoLevelAllocator` has the meanings."""

    @property
    def available(self) -> int:
        """Units (large pages) that hold nothing live and could serve any group."""

    def state(self, group: int, page: int) -> PageState:
        """State of a page."""

    def large_pages_needed(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> int:
        """Units that granting ``pages[g]`` pages to every group takes; above `available`: it does not fit."""

    def fits(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> bool:
        """Whether these pages can be granted now, with the `pins` revived."""

    def tick(self) -> None:
        """Advance the clock of the eviction order."""

    def expect(self, pages: Sequence[int]) -> None:
        """Announce what the current request will still ask of each group."""

    def allocate(self, group: int, count: int) -> list[int]:
        """Grant pages; they become live."""

    def release(self, group: int, page: int, keep: bool) -> None:
        """A live page becomes cached (`keep`) or free."""

    def revive(self, group: int, page: int) -> None:
        """A cached page becomes live."""

    def forget(self, group: int, page: int) -> None:
        """A cached page becomes free."""

    def usage(self) -> Usage:
        """Pages by state."""

    def counters(self) -> Counters:
        """Totals since start."""


class Shape(Protocol):
    """How a plan's memory is divided: sizes only, no pages yet."""

    @property
    def units(self) -> int:
        """Large pages in the buffer, the reserved ones included."""

    @property
    def divided_into(self) -> str:
        """What the units are, in words."""

    def build(self, on_evict: EvictCallback | None = None) -> Pool:
        """A pool with every page free."""

    def holds(self, pages: Sequence[int]) -> bool:
        """Whether an empty pool can hold ``pages[g]`` live pages of every group at once, shared as well as can be."""

    def owned(self, pages: Sequence[int]) -> list[int]:
        """Units that every group owns when it holds ``pages[g]`` live pages, shared as well as can be."""

    @property
    def reserved(self) -> int:
        """Units that are never granted."""


@dataclass(frozen=True)
class TwoLevel:
    """Large pages that any group may take and cut into ``ratios[g]`` pages; the first `reserved` are the null page.

    A page of group ``g`` has a part in each of ``widths[g]`` large pages (default: 1).
    """

    units: int
    ratios: tuple[int, ...]
    reserved: int = 1
    widths: tuple[int, ...] | None = None

    @property
    def divided_into(self) -> str:
        return "large pages"

    def build(self, on_evict: EvictCallback | None = None) -> Pool:
        return TwoLevelAllocator(self.units, self.ratios, widths=self.widths, reserved=self.reserved, on_evict=on_evict)

    def holds(self, pages: Sequence[int]) -> bool:
        return sum(self.owned(pages)) <= self.units - self.reserved

    def owned(self, pages: Sequence[int]) -> list[int]:
        widths = self.widths or (1,) * len(self.ratios)
        return [-(-count // r) * w for count, r, w in zip(pages, self.ratios, widths, strict=True)]


@dataclass(frozen=True)
class Partitions:
    """A fixed part of the buffer for every group, for good: ``slots[g]`` pages of ``strides[g]`` bytes.

    The first ``nulls[g]`` pages of a part are never granted.
    """

    slots: tuple[int, ...]
    strides: tuple[int, ...]
    nulls: tuple[int, ...]

    @property
    def divided_into(self) -> str:
        return "fixed parts"

    @property
    def unit_bytes(self) -> int:
        """Bytes in which the parts are counted."""
        return gcd(*self.strides)

    @property
    def units(self) -> int:
        return sum(n * s for n, s in zip(self.slots, self.strides, strict=True)) // self.unit_bytes

    def build(self, on_evict: EvictCallback | None = None) -> Pool:
        return PartitionedPool(self, on_evict)

    @property
    def weights(self) -> tuple[int, ...]:
        """Units of one page, by group."""
        return tuple(stride // self.unit_bytes for stride in self.strides)

    @property
    def reserved(self) -> int:
        return sum(nulls * weight for nulls, weight in zip(self.nulls, self.weights, strict=True))

    @property
    def usable(self) -> tuple[int, ...]:
        """Pages that can be granted, by group."""
        return tuple(slots - nulls for slots, nulls in zip(self.slots, self.nulls, strict=True))

    def holds(self, pages: Sequence[int]) -> bool:
        return all(count <= slots for count, slots in zip(pages, self.usable, strict=True))

    def owned(self, pages: Sequence[int]) -> list[int]:
        return [slots * weight for slots, weight in zip(self.usable, self.weights, strict=True)]


class PartitionedPool:
    """One pool per group; what one group lacks, no other can lend.

    In `usage` every part belongs to its group for good, so its empty pages are stranded, never free.
    """

    def __init__(self, shape: Partitions, on_evict: EvictCallback | None = None) -> None:
        self._shape = shape

        def report(group: int) -> EvictCallback | None:
            if on_evict is None:
                return None
            return lambda _, page: on_evict(group, page)

        self._parts = [
            TwoLevelAllocator(slots, (1,), reserved=nulls, on_evict=report(group))
            for group, (slots, nulls) in enumerate(zip(shape.slots, shape.nulls, strict=True))
        ]

    def _part(self, group: int, page: int | None = None) -> TwoLevelAllocator:
        if not 0 <= group < len(self._parts):
            at = "" if page is None else f" (asked for its page {page})"
            raise PageError(f"there is no group {group}{at}; groups are 0 to {len(self._parts) - 1}")
        return self._parts[group]

    @property
    def available(self) -> int:
        return sum(part.available * w for part, w in zip(self._parts, self._shape.weights, strict=True))

    def state(self, group: int, page: int) -> PageState:
        return self._part(group, page).state(0, page)

    def large_pages_needed(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> int:
        needed = lacking = 0
        for g, (part, weight) in enumerate(zip(self._parts, self._shape.weights, strict=True)):
            take = part.large_pages_needed((pages[g],), (pins[g],) if pins else ())
            needed += take * weight
            lacking += max(0, take - part.available) * weight
        return self.available + lacking if lacking else needed

    def fits(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> bool:
        return all(part.fits((pages[g],), (pins[g],) if pins else ()) for g, part in enumerate(self._parts))

    def tick(self) -> None:
        for part in self._parts:
            part.tick()

    def expect(self, pages: Sequence[int]) -> None:
        for part, count in zip(self._parts, pages, strict=True):
            part.expect((count,))

    def allocate(self, group: int, count: int) -> list[int]:
        return self._part(group).allocate(0, count)

    def release(self, group: int, page: int, keep: bool) -> None:
        self._part(group, page).release(0, page, keep)

    def revive(self, group: int, page: int) -> None:
        self._part(group, page).revive(0, page)

    def forget(self, group: int, page: int) -> None:
        self._part(group, page).forget(0, page)

    def usage(self) -> Usage:
        groups = []
        reserved = evictable = 0
        for part, weight in zip(self._parts, self._shape.weights, strict=True):
            own = part.usage()
            reserved += own.reserved * weight
            evictable += own.evictable * weight
            one = own.groups[0]
            groups.append(
                GroupUsage(
                    large_pages=(one.large_pages + own.free) * weight,
                    live=one.live,
                    cached=one.cached,
                    stranded=one.stranded + own.free,
                )
            )
        return Usage(self._shape.units, reserved=reserved, free=0, evictable=evictable, groups=tuple(groups))

    def counters(self) -> Counters:
        parts = [part.counters() for part in self._parts]
        return Counters(
            evicted_pages=tuple(c.evicted_pages[0] for c in parts),
            evicted_large_pages=sum(c.evicted_large_pages for c in parts),
            whole_page_grants=0,
        )


@dataclass(frozen=True)
class Chunks:
    """`units` equal chunks; a page of group ``g`` needs ``spans[g]`` adjacent ones, at any place.

    The first `reserved` are never granted.
    """

    units: int
    spans: tuple[int, ...]
    reserved: int

    @property
    def divided_into(self) -> str:
        return "chunks"

    def build(self, on_evict: EvictCallback | None = None) -> Pool:
        return ChunkedPool(self, on_evict)

    def holds(self, pages: Sequence[int]) -> bool:
        # Laid one beside the other, in order of size, pages leave no gap.
        return sum(self.owned(pages)) <= self.units - self.reserved

    def owned(self, pages: Sequence[int]) -> list[int]:
        return [count * span for count, span in zip(pages, self.spans, strict=True)]


class ChunkedPool:
    """Pages of several sizes side by side in one buffer: a page is named by its first chunk.

    Best fit, neighbours merge when freed.  Cached pages are evicted least recently used first until a run is
    long enough, whatever they are, as an allocator must that knows nothing of what lies beside them.
    """

    def __init__(self, shape: Chunks, on_evict: EvictCallback | None = None) -> None:
        self._spans = shape.spans
        self._units = shape.units
        self._reserved = shape.reserved
        if shape.units <= self._reserved:
            raise ValueError(f"{shape.units} chunks, {self._reserved} of them reserved: none is left to grant")
        self._on_evict = on_evict
        self._runs = FreeRuns(self._reserved, shape.units)
        self._gaps = FreeRuns(self._reserved, shape.units)  # between live pages: free, set aside or cached
        self._live: list[set[int]] = [set() for _ in shape.spans]
        self._cached: list[set[int]] = [set() for _ in shape.spans]
        self._order: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._aside: list[list[int]] = [[] for _ in shape.spans]  # by `expect`
        self._evicted = [0] * len(shape.spans)

    @property
    def available(self) -> int:
        return self._free + sum(s * len(c) for s, c in zip(self._spans, self._cached, strict=True))

    @property
    def _free(self) -> int:
        """Free chunks, those set aside included."""
        return self._runs.free + sum(s * len(a) for s, a in zip(self._spans, self._aside, strict=True))

    def _check(self, group: int, page: int) -> None:
        if not 0 <= group < len(self._spans):
            raise PageError(f"there is no group {group}; groups are 0 to {len(self._spans) - 1}")
        if not 0 <= page < self._units:
            raise PageError(f"group {group} has no page {page}; chunks are 0 to {self._units - 1}")

    def state(self, group: int, page: int) -> PageState:
        self._check(group, page)
        if page in self._live[group]:
            return PageState.LIVE
        return PageState.CACHED if page in self._cached[group] else PageState.FREE

    def _require(self, group: int, page: int, wanted: PageState) -> None:
        found = self.state(group, page)
        if found != wanted:
            raise PageError(f"page {page} of group {group} is {found.name.lower()}, not {wanted.name.lower()}")

    def large_pages_needed(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> int:
        """Chunks, the cached pages to be revived included; more than `available` if no run is long enough."""
        pinned = [{p for p in pins[g] if p in c} if pins else set() for g, c in enumerate(self._cached)]
        held = sum(len(p) * s for p, s in zip(pinned, self._spans, strict=True))
        needed = held + sum(n * s for n, s in zip(pages, self._spans, strict=True))
        if needed > self.available:
            return needed
        return needed if self._place(pages, pinned) else self.available + 1

    def _wanted(self, pages: Sequence[int]) -> list[tuple[int, int, int]]:
        """(span, count, group) of what is asked, the longest spans first."""
        groups = enumerate(zip(self._spans, pages, strict=True))
        return sorted(((span, count, g) for g, (span, count) in groups if count), reverse=True)

    def _place(self, pages: Sequence[int], pinned: Sequence[set[int]]) -> bool:
        """Whether the pages fit into the gaps between live (and pinned) pages."""
        wanted = [(span, count) for span, count, _ in self._wanted(pages)]
        if not self._runs.pack(wanted)[1]:
            return True
        kept = [(page, span) for span, group in zip(self._spans, pinned, strict=True) for page in group]
        for page, span in kept:
            self._gaps.claim(page, span)
        _, homeless = self._gaps.pack(wanted)
        for page, span in kept:
            self._gaps.give(page, span)
        return not homeless

    def fits(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> bool:
        return self.large_pages_needed(pages, pins) <= self.available

    def tick(self) -> None:
        """Nothing to do: pages are evicted in the order of their release."""

    def expect(self, pages: Sequence[int]) -> None:
        """Find room for what is announced, and set it aside, evicting as it must: later calls cannot spoil it."""
        self._give_back()
        wanted = self._wanted(pages)
        needed = sum(span * count for span, count, _ in wanted)
        while True:
            while self._runs.free < needed and self._order:
                self._evict(*next(iter(self._order)))
            placed, homeless = self._runs.pack([(span, count) for span, count, _ in wanted])
            if not homeless or not self._order:
                break
            # Looking for places costs much more than an eviction, and half of what has none is surely not enough.
            enough = self._runs.free + -(-homeless // 2)
            while self._runs.free < enough and self._order:
                self._evict(*next(iter(self._order)))
        for (span, _, group), starts in zip(wanted, placed if not homeless else [], strict=False):
            for start in starts:
                self._runs.claim(start, span)
            self._aside[group] = starts

    def _give_back(self) -> None:
        for group, starts in enumerate(self._aside):
            for start in starts:
                self._runs.give(start, self._spans[group])
        self._aside = [[] for _ in self._spans]

    def allocate(self, group: int, count: int) -> list[int]:
        if not 0 <= group < len(self._spans) or count < 0:
            raise PageError(f"cannot allocate {count} pages of group {group} of {len(self._spans)}")
        span = self._spans[group]
        aside = self._aside[group]
        granted = [aside.pop() for _ in range(min(count, len(aside)))]
        own = len(granted)
        while len(granted) < count:
            start = self._runs.take(span)
            if start is not None:
                granted.append(start)
            elif self._order:
                self._evict(*next(iter(self._order)))
            else:
                for page in granted[own:]:
                    self._runs.give(page, span)
                aside.extend(granted[:own])
                raise OutOfPagesError(
                    f"group {group} asks for {count} pages of {span} adjacent chunks: {self._runs.free} chunks are "
                    f"free, but only {len(granted)} such runs"
                )
        self._live[group].update(granted)
        for page in granted:
            self._gaps.claim(page, span)
        return granted

    def _evict(self, group: int, page: int) -> None:
        self._drop(group, page)
        self._evicted[group] += 1
        if self._on_evict is not None:
            self._on_evict(group, page)

    def _drop(self, group: int, page: int) -> None:
        self._cached[group].remove(page)
        del self._order[group, page]
        self._runs.give(page, self._spans[group])

    def release(self, group: int, page: int, keep: bool) -> None:
        self._require(group, page, PageState.LIVE)
        self._live[group].remove(page)
        self._gaps.give(page, self._spans[group])
        if keep:
            self._cached[group].add(page)
            self._order[group, page] = None
        else:
            self._runs.give(page, self._spans[group])

    def revive(self, group: int, page: int) -> None:
        self._require(group, page, PageState.CACHED)
        self._cached[group].remove(page)
        del self._order[group, page]
        self._live[group].add(page)
        self._gaps.claim(page, self._spans[group])

    def forget(self, group: int, page: int) -> None:
        self._require(group, page, PageState.CACHED)
        self._drop(group, page)

    def usage(self) -> Usage:
        groups = tuple(
            GroupUsage(large_pages=(len(live) + len(cached)) * span, live=len(live), cached=len(cached), stranded=0)
            for span, live, cached in zip(self._spans, self._live, self._cached, strict=True)
        )
        return Usage(
            self._units,
            reserved=self._reserved,
            free=self._free,
            evictable=self.available - self._free,
            groups=groups,
        )

    def counters(self) -> Counters:
        return Counters(evicted_pages=tuple(self._evicted), evicted_large_pages=0, whole_page_grants=0)
