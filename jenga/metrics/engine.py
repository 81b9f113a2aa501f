"""What one engine reports: its memory, its requests, and totals since it started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from jenga.allocator import AGE_BUCKETS, CLOCK_HZ, EVICTION_CAUSES, Counters, TwoLevelAllocator
from jenga.metrics.definitions import CHECKPOINT_CAUSES, EVICTION_BUCKETS, REGISTRY
from jenga.metrics.memory import MemorySnapshot, check_schema
from jenga.metrics.samples import Observed, Sample, memory_samples

PERIOD = 4.0
"""Seconds between two questions to an engine core: at most 1 % of its scheduler's time (`benchmarks/metrics.py`)."""


@dataclass(frozen=True)
class HitTotals:
    """Totals since start over admitted requests; all of them sum over engines."""

    requests: int
    """Requests admitted (once each time they are admitted: again after a preemption)."""
    lookup_tokens: int
    """Their tokens that were looked up."""
    hit_requests: int
    """Those that could skip at least one token."""
    hit_tokens: int
    """Tokens skipped."""
    missed_shared_tokens: int
    """Tokens beyond the hit that some group had cached: what the group that ended the hit cost."""
    reused_pages: tuple[int, ...]
    """Cached pages taken over, by group; pages of unlike groups do not add."""
    ended: tuple[int, ...]
    """Hits that this group ended although another could have gone further."""


@dataclass(frozen=True)
class RequestCounts:
    """Requests now, and totals of those that memory was refused to, by the group that asked for most of it."""

    resident: int
    """Requests that hold pages."""
    waiting: int
    admissions_refused: tuple[int, ...]
    """Once per wait."""
    growths_refused: tuple[int, ...]
    """Each is the reason of a preemption."""


@dataclass(frozen=True)
class CheckpointTotals:
    """Recurrent states of one group: those findable now, and totals."""

    kept: int
    made: int
    dropped: tuple[int, ...]
    """By cause (`CHECKPOINT_CAUSES`); `made` less these are the kept ones."""


@dataclass(frozen=True)
class StockUse:
    """What vLLM's own plan would do with the present requests, bytes."""

    held: int
    wasted: int


@dataclass(frozen=True)
class EngineReport:
    """One engine at one moment, and its totals so far."""

    time: float
    """When it was written, seconds since 1970."""
    memory: MemorySnapshot
    counters: Counters
    hits: HitTotals
    requests: RequestCounts
    page_tokens: tuple[int, ...]
    """Tokens per page, by group."""
    ages: tuple[Observed, ...]
    """Ages at eviction in seconds, by group; buckets are `EVICTION_BUCKETS`."""
    checkpoints: tuple[CheckpointTotals | None, ...]
    """By group; None where it has no recurrent states, or nothing is cached."""
    stock: StockUse | None
    """None if vLLM has no plan for the model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the way between processes."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EngineReport:
        """The inverse of `to_dict`; sequences may have become lists on the way.

        Raises:
            ValueError: written by another version.
        """
        check_schema(data.get("memory"))
        return msgspec.convert(data, cls)


# The allocator's buckets end at powers of two, and so do these: some of its make one of ours.
_ENDS = [round(end * CLOCK_HZ).bit_length() for end in EVICTION_BUCKETS]
_CUTS = [slice(a, b) for a, b in zip([0, *_ENDS], [*_ENDS, AGE_BUCKETS], strict=True)]
_NO_AGES = Observed((0,) * len(_CUTS), (0.0,) * len(_CUTS))


def eviction_ages(allocator: TwoLevelAllocator) -> tuple[Observed, ...]:
    """The allocator's evictions by age, in the buckets that are exported."""
    found = []
    for group in range(len(allocator.ratios)):
        numbers, sums = allocator.eviction_ages(group)
        if any(numbers):
            counts = tuple(sum(numbers[cut]) for cut in _CUTS)
            found.append(Observed(counts, tuple(sum(sums[cut]) / CLOCK_HZ for cut in _CUTS)))
        else:
            found.append(_NO_AGES)
    return tuple(found)


def report_samples(report: EngineReport) -> Iterator[Sample]:
    """The time series of a report; every definition with the source ``engine``, and no other."""
    hits, requests, counters = report.hits, report.requests, report.counters

    def one(name: str, value: float | Observed, **labels: str) -> Sample:
        return Sample(REGISTRY[name], value, labels)

    yield from memory_samples(report.memory)
    yield one("jenga_report_timestamp_seconds", report.time)
    yield one("jenga_requests", requests.resident, state="resident")
    yield one("jenga_requests", requests.waiting, state="waiting")
    yield one("jenga_admitted_requests_total", hits.requests)
    yield one("jenga_lookup_tokens_total", hits.lookup_tokens)
    yield one("jenga_hit_requests_total", hits.hit_requests)
    yield one("jenga_hit_tokens_total", hits.hit_tokens)
    yield one("jenga_missed_shared_tokens_total", hits.missed_shared_tokens)
    yield one("jenga_evicted_large_pages_total", counters.evicted_large_pages)
    yield one("jenga_whole_page_grants_total", counters.whole_page_grants)
    if report.stock is not None:
        yield one("jenga_stock_held_bytes", report.stock.held)
        yield one("jenga_stock_wasted_bytes", report.stock.wasted)
    for g, memory in enumerate(report.memory.groups):
        group = memory.name
        yield one("jenga_admission_refusals_total", requests.admissions_refused[g], group=group)
        yield one("jenga_preemptions_total", requests.growths_refused[g], group=group)
        yield one("jenga_group_hit_tokens_total", hits.reused_pages[g] * report.page_tokens[g], group=group)
        yield one("jenga_reused_pages_total", hits.reused_pages[g], group=group)
        yield one("jenga_hits_ended_total", hits.ended[g], group=group)
        for cause, pages in zip(EVICTION_CAUSES, counters.evicted_by_cause[g], strict=True):
            yield one("jenga_evicted_pages_total", pages, group=group, cause=cause)
        yield one("jenga_eviction_age_seconds", report.ages[g], group=group)
        states = report.checkpoints[g]
        if states is not None:
            yield one("jenga_kept_checkpoints", states.kept, group=group)
            yield one("jenga_checkpoints_made_total", states.made, group=group)
            for cause, dropped in zip(CHECKPOINT_CAUSES, states.dropped, strict=True):
                yield one("jenga_checkpoints_dropped_total", dropped, group=group, cause=cause)
