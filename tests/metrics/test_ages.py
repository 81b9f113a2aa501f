"""Evictions by cause and by age, worked by hand."""

from __future__ import annotations

from jenga.allocator import CLOCK_HZ, EVICTION_CAUSES, TwoLevelAllocator
from jenga.metrics.definitions import EVICTION_BUCKETS
from jenga.metrics.engine import eviction_ages


def at(seconds: float) -> int:
    return int(seconds * CLOCK_HZ)


def test_evictions_by_cause_and_age() -> None:
    pool = TwoLevelAllocator(4, [2, 1])  # three large pages to grant
    pool.tick(at(100))
    first, second = pool.allocate(0, 2)
    third = pool.allocate(0, 1)[0]
    pool.release(0, first, keep=True)  # 100 s: beside the live page `second`
    pool.tick(at(110))
    pool.release(0, third, keep=True)  # 110 s: alone in its large page
    pool.tick(at(112))
    other = pool.allocate(1, 1)[0]
    pool.release(1, other, keep=True)  # 112 s
    pool.tick(at(114.5))
    assert pool.allocate(0, 1) == [first]  # 14.5 s
    pool.tick(at(128))
    assert third in pool.allocate(0, 2)  # the free slot beside it, then its own place: 18 s
    pool.tick(at(1117))
    pool.allocate(1, 1)  # the group's own oldest: 1,005 s
    pool.release(0, second, keep=True)
    pool.forget(0, second)
    by_cause = [dict(zip(EVICTION_CAUSES, found, strict=True)) for found in pool.counters().evicted_by_cause]
    assert by_cause[0] == {"large_page": 0, "beside_live": 2, "own_oldest": 0, "forgotten": 1, "unreachable": 0}
    assert by_cause[1] == {"large_page": 0, "beside_live": 0, "own_oldest": 1, "forgotten": 0, "unreachable": 0}
    assert pool.counters().evicted_pages == (2, 1)
    ages = [
        {
            end: (n, round(total, 3))
            for end, n, total in zip((*EVICTION_BUCKETS, None), a.counts, a.sums, strict=True)
            if n
        }
        for a in eviction_ages(pool)
    ]
    assert ages == [{16.0: (1, 14.5), 64.0: (1, 18.0)}, {1024.0: (1, 1005.0)}]


def test_a_large_page_is_one_eviction_of_several_pages() -> None:
    pool = TwoLevelAllocator(2, [3, 1])
    pages = pool.allocate(0, 3)
    for seconds, page in zip((1, 2, 3), pages, strict=True):
        pool.tick(at(seconds))
        pool.release(0, page, keep=True)
    pool.tick(at(7))
    pool.allocate(1, 1)
    assert pool.counters().evicted_by_cause == ((3, 0, 0, 0, 0), (0, 0, 0, 0, 0))
    found = eviction_ages(pool)[0]
    assert found.counts[EVICTION_BUCKETS.index(4.0)] == sum(found.counts) == 1, "4 s is still in the bucket up to 4"
    assert sum(found.sums) == 4


def test_what_is_evicted_at_once_is_in_the_first_bucket() -> None:
    pool = TwoLevelAllocator(2, [1, 1])
    pool.tick(at(5))
    pool.release(0, pool.allocate(0, 1)[0], keep=True)
    pool.allocate(1, 1)
    numbers, steps = pool.eviction_ages(0)
    assert (numbers.index(1), sum(numbers), sum(steps)) == (0, 1, 0)


def test_without_a_time_the_clock_counts_steps() -> None:
    pool = TwoLevelAllocator(2, [1, 1])
    pool.tick(at(50))
    pool.tick(at(3))  # never back
    assert pool.clock == at(50) + 1
