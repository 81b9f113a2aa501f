"""What one engine reports of its memory: the snapshot, the allocator's totals and the prefix hits by group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jenga.allocator import Counters
from jenga.metrics.memory import MemorySnapshot
from jenga.metrics.samples import Sample, samples


@dataclass(frozen=True)
class HitTotals:
    """Totals since start over admitted requests; all of them sum over engines."""

    requests: int
    """Requests admitted (once each time they are admitted: again after a preemption)."""
    hit_requests: int
    """Those that could skip at least one token."""
    hit_tokens: int
    """Prompt tokens skipped."""
    missed_shared_tokens: int
    """Tokens beyond the hit that some group had cached: what the group that ended the hit cost."""
    reused_pages: tuple[int, ...]
    """Cached pages taken over, by group; pages of unlike groups do not add."""
    ended: tuple[int, ...]
    """Hits that this group ended although another could have gone further."""


@dataclass(frozen=True)
class EngineReport:
    """One engine's memory at one moment, and its totals so far."""

    memory: MemorySnapshot
    counters: Counters
    hits: HitTotals

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the way between processes."""
        return {"memory": self.memory.to_dict(), "counters": asdict(self.counters), "hits": asdict(self.hits)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EngineReport:
        """The inverse of `to_dict`; sequences may have become lists on the way.

        Raises:
            ValueError: written under another schema version.
        """
        counters, hits = data["counters"], data["hits"]
        return cls(
            memory=MemorySnapshot.from_dict(data["memory"]),
            counters=Counters(**{**counters, "evicted_pages": tuple(counters["evicted_pages"])}),
            hits=HitTotals(**{**hits, "reused_pages": tuple(hits["reused_pages"]), "ended": tuple(hits["ended"])}),
        )


def report_samples(report: EngineReport) -> Iterator[Sample]:
    """The time series of a report."""
    yield from samples(report.memory, report.counters)
    hits = report.hits

    def counter(name: str, text: str, value: int, **labels: str) -> Sample:
        return Sample(name, "counter", text, labels, value)

    yield counter("jenga_admitted_requests_total", "Requests admitted", hits.requests)
    yield counter("jenga_hit_requests_total", "Admitted requests that skipped a cached prefix", hits.hit_requests)
    yield counter("jenga_hit_tokens_total", "Prompt tokens skipped through prefix hits", hits.hit_tokens)
    yield counter(
        "jenga_missed_shared_tokens_total",
        "Tokens beyond a hit that one group had cached and another could not resume",
        hits.missed_shared_tokens,
    )
    for group, reused, ended in zip(report.memory.groups, hits.reused_pages, hits.ended, strict=True):
        yield counter("jenga_reused_pages_total", "Cached pages taken over by hits", reused, group=group.name)
        yield counter("jenga_hits_ended_total", "Hits that this group ended before another", ended, group=group.name)
