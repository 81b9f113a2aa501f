"""What a simulation reports: immutable, plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jenga.layers import Counts, pages_held
from jenga.metrics import memory_snapshot
from jenga.prefix_cache import PrefixCache
from jenga.strategies import Plan

CAUSES = ("needed", "cached", "tail", "padding", "stranded", "droppable", "reserved", "free", "remainder")
"""Everything that a byte of the buffer can be, in the order of tables and plots."""

WASTE = ("padding", "stranded", "droppable", "reserved")
"""Causes that a better memory manager could avoid (page tails are reported apart)."""


@dataclass(frozen=True)
class MemorySample:
    """The buffer at one moment."""

    time_s: float
    running: int
    waiting: int
    saturated: bool
    """Whether some request waited because memory was short."""
    bytes_by_cause: Mapping[str, int]
    """Sums to the buffer."""


@dataclass(frozen=True)
class Percentiles:
    """Of a distribution, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Nearest-rank percentiles; zeros if there are no values."""
        ranked = sorted(values)
        if not ranked:
            return cls(0.0, 0.0, 0.0)

        def at(share: float) -> float:
            return ranked[min(len(ranked) - 1, int(share * len(ranked)))]

        return cls(at(0.5), at(0.9), at(0.99))


@dataclass(frozen=True)
class SimulationResult:
    """One trace under one plan."""

    strategy: str
    model: str
    memory_bytes: int
    hit_granularity: int
    """Prefix hits are multiples of this, in tokens."""
    requests: int
    rejected: int
    """Requests that do not fit into the empty buffer."""
    seconds: float
    """Simulated time."""
    prompt_tokens: int
    output_tokens: int
    hit_tokens: int
    """Prompt tokens found in the cache when a request was first admitted."""
    resumed_hit_tokens: int
    """Tokens found again by preempted requests."""
    recomputed_tokens: int
    """Tokens computed a second time after a preemption."""
    preemptions: int
    resident_peak: int
    resident_mean: float
    """Requests that hold memory, averaged over the time in which memory was short (all the time, if it never was)."""
    saturated_share: float
    """Share of the time in which memory was short."""
    ttft_s: Percentiles
    """Time to first token, from arrival."""
    samples: tuple[MemorySample, ...]

    @property
    def requests_per_s(self) -> float:
        """Requests finished per simulated second."""
        return (self.requests - self.rejected) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per simulated second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_share(self) -> float:
        """Share of the prompt tokens found in the cache."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def steady(self) -> dict[str, float]:
        """Share of the buffer by cause, averaged over the samples in which memory was short (all, if it never was)."""
        chosen = [s for s in self.samples if s.saturated] or list(self.samples)
        return {
            cause: sum(s.bytes_by_cause[cause] for s in chosen) / max(1, len(chosen)) / self.memory_bytes
            for cause in CAUSES
        }

    def waste(self) -> float:
        """Share of the buffer that is avoidable waste (`WASTE`) at steady state."""
        steady = self.steady()
        return sum(steady[cause] for cause in WASTE)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, derived figures included."""
        return asdict(self) | {
            "requests_per_s": self.requests_per_s,
            "tokens_per_s": self.tokens_per_s,
            "hit_share": self.hit_share,
            "steady": self.steady(),
            "waste": self.waste(),
        }


def bytes_by_cause(plan: Plan, cache: PrefixCache) -> dict[str, int]:
    """Where the buffer's bytes are now; the values sum to the plan's memory.

    Differs from `jenga.metrics.memory_snapshot` where a plan puts layers of unlike types into one group: what one of
    them could drop counts as droppable although the page as a whole is needed.
    """
    causes = memory_snapshot(plan.layout, cache.pool.usage(), plan.memory_bytes, cache.live_use()).by_cause()
    for g, (place, shares) in enumerate(zip(plan.groups, plan.contents, strict=True)):
        size = place.group.page_tokens
        for share in shares:
            if share.type.policy == place.group.policy and share.type.counts == plan.counts[g]:
                continue
            unneeded: set[int] = set()
            for table in cache.tables(g):
                length = share.type.counts.length(table.computed, table.image_tokens)
                needed = pages_held(share.type.policy, length, size)
                if share.type.counts is not Counts.IMAGES:  # the step under way still reads what slides out
                    first = share.type.policy.resident_from
                    needed += first(table.computed, size) - first(table.reading, size)
                over = len(table.pages) - needed
                # Which of the pages are not needed depends on the type; the first ones stand for them.
                unneeded.update(page for page, _ in zip(table.pages.values(), range(over), strict=False))
            moved = min(causes["needed"], len(unneeded) * share.type.page_bytes(size) * share.layers)
            causes["needed"] -= moved
            causes["droppable"] += moved
    return causes
