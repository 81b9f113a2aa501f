"""Values of defined metrics; exporters only map `Sample` onto their own types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jenga.metrics.definitions import POOL, REGISTRY, Metric
from jenga.metrics.memory import GROUP_CAUSES, POOL_CAUSES, MemorySnapshot


@dataclass(frozen=True)
class Observed:
    """Running totals of a histogram: values in each bucket (the last one has no end), and their sums."""

    counts: tuple[int, ...]
    sums: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """One value of one time series; a counter's and a histogram's are running totals."""

    metric: Metric
    value: float | Observed
    labels: Mapping[str, str]


def memory_samples(snapshot: MemorySnapshot) -> Iterator[Sample]:
    """The time series of a snapshot.

    ``sum(jenga_memory_bytes)`` is the buffer; ``sum(jenga_large_pages)`` all large pages.
    """

    def one(name: str, value: float, **labels: str) -> Sample:
        return Sample(REGISTRY[name], value, labels)

    for group in snapshot.groups:
        for cause in GROUP_CAUSES:
            yield one("jenga_memory_bytes", getattr(group, f"{cause}_bytes"), group=group.name, state=cause)
        for state in ("live", "cached", "stranded"):
            yield one("jenga_pages", getattr(group, f"{state}_pages"), group=group.name, state=state)
        yield one("jenga_large_pages", group.large_pages, group=group.name, state="owned")
        owned = group.large_pages * snapshot.large_page_bytes
        yield one("jenga_fragmentation_ratio", group.stranded_bytes / owned if owned else 0.0, group=group.name)
    for cause in POOL_CAUSES:
        yield one("jenga_memory_bytes", getattr(snapshot, f"{cause}_bytes"), group=POOL, state=cause)
    yield one("jenga_large_pages", snapshot.free_large_pages, group=POOL, state="free")
    yield one("jenga_large_pages", snapshot.reserved_large_pages, group=POOL, state="reserved")
    yield one("jenga_evictable_large_pages", snapshot.evictable_large_pages)
    yield one("jenga_buffer_bytes", snapshot.buffer_bytes)
    yield one("jenga_large_page_bytes", snapshot.large_page_bytes)
