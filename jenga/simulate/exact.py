"""The bound: memory counted in bytes, where any free bytes can become any page.

Pages have their natural size, so tails remain, but nothing is padded, stranded or reserved, and eviction takes the
least recently used page of all.  No real allocator can be this good; it says what a strategy could gain at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jenga.allocator import Counters, EvictCallback, GroupUsage, OutOfPagesError, PageError, PageState, Usage
from jenga.layers import LayerType
from jenga.layout import GroupLayout, Layout
from jenga.strategies import Plan, Pool, Share
from jenga.strategies.base import group_of

NAME = "exact"


@dataclass(frozen=True)
class Bytes:
    """``page_bytes[g]`` bytes for a page of group ``g``, anywhere."""

    units: int
    page_bytes: tuple[int, ...]
    reserved: int = 0

    @property
    def divided_into(self) -> str:
        """What the units are."""
        return "bytes"

    def build(self, on_evict: EvictCallback | None = None) -> Pool:
        """A pool with every byte free."""
        return BytePool(self.units, self.page_bytes, on_evict)

    def holds(self, pages: Sequence[int]) -> bool:
        """Whether an empty pool can hold ``pages[g]`` live pages of every group at once."""
        return sum(self.owned(pages)) <= self.units

    def owned(self, pages: Sequence[int]) -> list[int]:
        """Bytes of ``pages[g]`` pages, by group."""
        return [n * b for n, b in zip(pages, self.page_bytes, strict=True)]


class BytePool:
    """The methods are those of `jenga.allocator.TwoLevelAllocator`, with bytes for large pages."""

    def __init__(self, memory_bytes: int, page_bytes: Sequence[int], on_evict: EvictCallback | None = None) -> None:
        self._memory = memory_bytes
        self._bytes = tuple(page_bytes)
        self._on_evict = on_evict
        self._live: list[set[int]] = [set() for _ in page_bytes]
        self._cached: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._spare: list[list[int]] = [[] for _ in page_bytes]  # page numbers given back
        self._numbered = [0] * len(page_bytes)
        self._evicted = [0] * len(page_bytes)
        self._live_bytes = 0
        self._cached_bytes = 0

    @property
    def available(self) -> int:
        """Bytes that hold nothing live."""
        return self._memory - self._live_bytes

    def state(self, group: int, page: int) -> PageState:
        """State of a page."""
        if not 0 <= group < len(self._bytes):
            raise PageError(f"there is no group {group}; groups are 0 to {len(self._bytes) - 1}")
        if page in self._live[group]:
            return PageState.LIVE
        return PageState.CACHED if (group, page) in self._cached else PageState.FREE

    def large_pages_needed(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> int:
        """Bytes that these pages, and the cached ones of `pins`, take from `available`."""
        needed = sum(n * b for n, b in zip(pages, self._bytes, strict=True))
        for g, pinned in enumerate(pins):
            needed += self._bytes[g] * sum(1 for page in set(pinned) if page not in self._live[g])
        return needed

    def fits(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> bool:
        """Whether these pages can be granted now, with the `pins` revived."""
        return self.large_pages_needed(pages, pins) <= self.available

    def tick(self) -> None:
        """Nothing to do: the order of releases is the order of eviction."""

    def expect(self, pages: Sequence[int]) -> None:
        """Nothing to do: bytes serve any group."""

    def allocate(self, group: int, count: int) -> list[int]:
        """Grant pages."""
        size = self._bytes[group]
        if count * size > self.available:
            raise OutOfPagesError(f"group {group} asks for {count} pages of {size} bytes, {self.available} are there")
        self._live_bytes += count * size
        while self._live_bytes + self._cached_bytes > self._memory:
            (owner, page), _ = self._cached.popitem(last=False)
            self._cached_bytes -= self._bytes[owner]
            self._spare[owner].append(page)
            self._evicted[owner] += 1
            if self._on_evict is not None:
                self._on_evict(owner, page)
        spare = self._spare[group]
        pages = [spare.pop() for _ in range(min(count, len(spare)))]
        first = self._numbered[group]
        self._numbered[group] += count - len(pages)
        pages.extend(range(first, self._numbered[group]))
        self._live[group].update(pages)
        return pages

    def _require(self, group: int, page: int, wanted: PageState) -> None:
        found = self.state(group, page)
        if found != wanted:
            raise PageError(f"page {page} of group {group} is {found.name.lower()}, not {wanted.name.lower()}")

    def release(self, group: int, page: int, keep: bool) -> None:
        """A live page becomes cached (`keep`) or free."""
        self._require(group, page, PageState.LIVE)
        self._live[group].remove(page)
        self._live_bytes -= self._bytes[group]
        if keep:
            self._cached[group, page] = None
            self._cached_bytes += self._bytes[group]
        else:
            self._spare[group].append(page)

    def revive(self, group: int, page: int) -> None:
        """A cached page becomes live."""
        self._require(group, page, PageState.CACHED)
        del self._cached[group, page]
        self._cached_bytes -= self._bytes[group]
        self._live[group].add(page)
        self._live_bytes += self._bytes[group]

    def forget(self, group: int, page: int) -> None:
        """A cached page becomes free."""
        self._require(group, page, PageState.CACHED)
        del self._cached[group, page]
        self._cached_bytes -= self._bytes[group]
        self._spare[group].append(page)

    def usage(self) -> Usage:
        """Pages by state; a unit is a byte."""
        cached = [0] * len(self._bytes)
        for group, _ in self._cached:
            cached[group] += 1
        groups = tuple(
            GroupUsage(large_pages=(len(live) + kept) * size, live=len(live), cached=kept, stranded=0)
            for live, kept, size in zip(self._live, cached, self._bytes, strict=True)
        )
        free = self._memory - self._live_bytes - self._cached_bytes
        return Usage(self._memory, reserved=0, free=free, evictable=self._cached_bytes, groups=groups)

    def counters(self) -> Counters:
        """Totals since start."""
        return Counters(evicted_pages=tuple(self._evicted), evicted_large_pages=0, whole_page_grants=0)


def exact_plan(model: str, types: Sequence[LayerType], memory_bytes: int) -> Plan:
    """The bound for `types`, the layers of `model`, in pages of their natural size."""
    tokens = max((t.block_tokens for t in types if not t.is_state), default=1)
    contents = tuple((Share(t, t.layers),) for t in types)
    groups = [
        group_of(t.name, shares, tokens if t.is_state else t.block_tokens)
        for t, shares in zip(types, contents, strict=True)
    ]
    sizes = tuple(g.page_bytes for g in groups)
    places = tuple(GroupLayout(g, 1, g.page_bytes) for g in groups)
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=Layout(1, places, 0.0, 0.0, "no geometry: bytes are counted"),
        contents=contents,
        shape=Bytes(memory_bytes, sizes),
        explanation="the bound: any free bytes can become any page",
    )
