"""Upper bounds: exact bytes, and hits of a clairvoyant cache."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jenga.allocator import OutOfPagesError, PageError, PageState
from jenga.layers import LayerType
from jenga.policies import FullAttention, SlidingWindow
from jenga.simulate import dense_bytes_per_token, hit_bound, plan_for, simulate
from jenga.simulate.clairvoyant import _most_intervals
from jenga.simulate.exact import BytePool
from jenga.traces import TraceRequest, agents, documents

FULL = LayerType("full", FullAttention(), layers=4, cell_bytes=256)
WINDOW = LayerType("window", SlidingWindow(128), layers=12, cell_bytes=256)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 7)), max_size=9),
    st.integers(0, 3),
)
def test_most_intervals_is_brute_force(pairs: list[tuple[int, int]], capacity: int) -> None:
    intervals = [(start, min(8, start + length)) for start, length in pairs]
    starting: list[list[int]] = [[] for _ in range(9)]
    for start, end in intervals:
        starting[start].append(end)
    best = 0
    for chosen in product((False, True), repeat=len(intervals)):
        kept = [i for i, c in zip(intervals, chosen, strict=True) if c]
        if all(sum(1 for s, e in kept if s < now <= e) <= capacity for now in range(10)):
            best = max(best, len(kept))
    assert _most_intervals(starting, capacity) == best


def served(*blocks: tuple[int, ...]) -> list[TraceRequest]:
    return [TraceRequest(i, 0.0, 16 * len(b) + 1, 1, (*b, 10**6 + i), 16, 16 * len(b)) for i, b in enumerate(blocks)]


def test_the_bound_keeps_what_is_used_next() -> None:
    trace = served((1, 2), (3, 4), (3, 4), (1, 2))
    assert hit_bound(trace, 1.0, 1000).limited == hit_bound(trace, 1.0, 1000).unlimited == 64
    assert hit_bound(trace, 1.0, 64).limited == 64
    # Room for two blocks: (3, 4) between its uses, nothing of (1, 2) beside it.
    assert hit_bound(trace, 1.0, 32).limited == 32
    assert hit_bound(trace, 1.0, 48).limited == 48
    assert hit_bound([], 1.0, 1).limited == 0
    assert hit_bound(trace, 0.0, 1).limited == 64


def test_only_layers_that_need_every_token_count() -> None:
    assert dense_bytes_per_token([FULL, WINDOW]) == 4 * 256


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([agents, documents]), st.sampled_from(["jenga", "vllm", "exact", "paged"]))
def test_no_strategy_hits_more_than_the_clairvoyant_bound(seed: int, make: object, strategy: str) -> None:
    trace = list(make(60, seed))  # type: ignore[operator]
    types = [WINDOW, FULL]
    memory = 96 << 20 if make is documents else 12 << 20
    result = simulate(plan_for(strategy, "m", types, memory, trace), types, trace)
    bound = hit_bound(trace, dense_bytes_per_token(types), memory)
    assert result.hit_tokens <= bound.limited <= bound.unlimited


def test_byte_pool() -> None:
    evicted: list[tuple[int, int]] = []
    pool = BytePool(100, (10, 30), lambda group, page: evicted.append((group, page)))
    tens = pool.allocate(0, 4)
    thirty = pool.allocate(1, 2)
    assert pool.available == 0
    with pytest.raises(OutOfPagesError):
        pool.allocate(0, 1)
    pool.release(0, tens[1], keep=True)
    pool.release(1, thirty[0], keep=True)
    pool.release(0, tens[0], keep=False)
    assert pool.available == 50
    assert pool.fits((5, 0))
    assert pool.fits((1, 0), ([], [thirty[0]]))
    assert not pool.fits((3, 0), ([], [thirty[0]]))
    with pytest.raises(PageError, match="is free, not live"):
        pool.release(0, tens[0], keep=False)
    with pytest.raises(PageError, match="no group 2"):
        pool.state(2, 0)
    pool.allocate(0, 2)  # one was free, the other evicts the oldest
    assert evicted == [(0, tens[1])]
    pool.revive(1, thirty[0])
    assert pool.state(1, thirty[0]) == PageState.LIVE
    pool.release(1, thirty[0], keep=True)
    pool.forget(1, thirty[0])
    usage = pool.usage()
    assert usage.free + sum(g.large_pages for g in usage.groups) == 100
    assert pool.counters().evicted_pages == (1, 0)
