"""Snapshots as samples with Prometheus names; exporters only map `Sample` onto their own types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from jenga.allocator import Counters
from jenga.metrics.memory import GROUP_CAUSES, POOL_CAUSES, MemorySnapshot

POOL = "(pool)"
"""Value of the label `group` for what belongs to no group."""


@dataclass(frozen=True)
class Sample:
    """One value of one time series; a counter's value is its running total."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: Mapping[str, str]
    value: float


def samples(snapshot: MemorySnapshot, counters: Counters | None = None) -> Iterator[Sample]:
    """The time series of a snapshot, and of the allocator's totals if given.

    ``sum(jenga_memory_bytes)`` is the buffer; ``sum(jenga_large_pages)`` all large pages.
    """

    def memory(group: str, state: str, value: int) -> Sample:
        text = "Bytes of the KV buffer by layer group and cause; their sum is the buffer"
        return Sample("jenga_memory_bytes", "gauge", text, {"group": group, "state": state}, value)

    def pages(group: str, state: str, value: int) -> Sample:
        return Sample("jenga_pages", "gauge", "Small pages by state", {"group": group, "state": state}, value)

    def large(group: str, state: str, value: int) -> Sample:
        text = "Large pages by owner; their sum is the pool"
        return Sample("jenga_large_pages", "gauge", text, {"group": group, "state": state}, value)

    for group in snapshot.groups:
        for cause in GROUP_CAUSES:
            yield memory(group.name, cause, getattr(group, f"{cause}_bytes"))
        for state in ("live", "cached", "stranded"):
            yield pages(group.name, state, getattr(group, f"{state}_pages"))
        yield large(group.name, "owned", group.large_pages)
    for cause in POOL_CAUSES:
        yield memory(POOL, cause, getattr(snapshot, f"{cause}_bytes"))
    yield large(POOL, "free", snapshot.free_large_pages)
    yield large(POOL, "reserved", snapshot.reserved_large_pages)
    yield Sample(
        "jenga_evictable_large_pages",
        "gauge",
        "Owned large pages without live pages: can be had by eviction (already in jenga_large_pages)",
        {},
        snapshot.evictable_large_pages,
    )
    yield Sample("jenga_buffer_bytes", "gauge", "The whole KV buffer", {}, snapshot.buffer_bytes)
    yield Sample("jenga_large_page_bytes", "gauge", "Size of one large page", {}, snapshot.large_page_bytes)
    if counters is not None:
        for group, evicted in zip(snapshot.groups, counters.evicted_pages, strict=True):
            text = "Cached small pages that lost their contents"
            yield Sample("jenga_evicted_pages_total", "counter", text, {"group": group.name}, evicted)
        text = "Evictable large pages emptied for another use"
        yield Sample("jenga_evicted_large_pages_total", "counter", text, {}, counters.evicted_large_pages)
        text = "Large pages granted whole to one request"
        yield Sample("jenga_whole_page_grants_total", "counter", text, {}, counters.whole_page_grants)
