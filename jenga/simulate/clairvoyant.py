"""An upper bound on prefix hits: what a cache could keep that knew every future request.

Any cache must have a prompt's shared tokens in memory at the admission that hits them, and between two uses it must
keep them or compute them again.  So a reuse of a block is an interval of admissions over which the block occupies
memory, and the most reuses that fit are the most intervals of which at most *capacity* overlap anywhere: taken by
start, the interval that ends last is given up whenever too many overlap (Belady's rule with bypass, which is optimal
for blocks of one size).

The bound is generous: it counts only the bytes of layers that need every token (windows and states are free), nothing
for the memory of running requests, and it lets a block hit although one before it was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from jenga.layers import Counts, LayerType
from jenga.traces import TraceRequest


@dataclass(frozen=True)
class HitBound:
    """Most hit tokens that any cache can have on a trace served in order of arrival."""

    unlimited: int
    """With unlimited memory."""
    limited: int
    """With the memory given."""


def dense_bytes_per_token(types: Sequence[LayerType]) -> float:
    """Bytes that layers which need every token store for one."""
    return sum(
        t.layers * t.cell_bytes / t.cell_tokens
        for t in types
        if not t.is_state and t.counts is not Counts.IMAGES and t.policy.resident_from(1 << 40, 1) == 0
    )


def hit_bound(trace: Sequence[TraceRequest], bytes_per_token: float, memory_bytes: int) -> HitBound:
    """Bound for a model that needs at least `bytes_per_token` bytes for every token of a prefix.

    Raises:
        ValueError: requests have blocks of unlike sizes.
    """
    if not trace:
        return HitBound(0, 0)
    size = trace[0].block_tokens
    if any(r.block_tokens != size for r in trace):
        raise ValueError("the bound needs one block size for all requests of a trace")
    capacity = int(memory_bytes / (bytes_per_token * size)) if bytes_per_token else 1 << 60
    last_use: dict[int, int] = {}
    starting: list[list[int]] = [[] for _ in trace]  # at admission i: the ends of reuse intervals that start there
    partial = unlimited = 0
    for now, request in enumerate(trace):
        if request.image_tokens:
            continue
        whole = request.known_tokens // size
        for index, block in enumerate(request.blocks):
            before = last_use.get(block)
            covered = min(size, request.prompt_tokens - 1 - index * size)
            if before is not None and covered > 0:
                unlimited += covered
                if covered == size:
                    starting[before].append(now)
                else:  # a piece of a block: counted, at no cost
                    partial += covered
            if index < whole or index * size < request.prompt_tokens:
                last_use[block] = now
    return HitBound(unlimited, partial + size * _most_intervals(starting, capacity))


def _most_intervals(starting: Sequence[Sequence[int]], capacity: int) -> int:
    """Most intervals (from each index to the ends listed there) of which at most `capacity` overlap."""
    kept = 0
    by_end: dict[int, int] = {}  # intervals open now, by end
    latest: list[int] = []  # their ends, as a heap of negatives (each once)
    open_now = 0
    for now, ends in enumerate(starting):
        done = by_end.pop(now, 0)
        open_now -= done
        kept += done
        for end in ends:
            if end not in by_end:
                by_end[end] = 0
                heappush(latest, -end)
            by_end[end] += 1
            open_now += 1
        while open_now > capacity:
            end = -latest[0]
            count = by_end.get(end, 0)
            give_up = min(count, open_now - capacity)
            if give_up < count:
                by_end[end] = count - give_up
            else:
                by_end.pop(end, None)
                heappop(latest)
            open_now -= give_up
    return kept
