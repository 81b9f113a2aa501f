"""Pools of the strategies that are not two-level, against a plain model of pages and bytes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jenga.allocator import OutOfPagesError, PageError, PageState
from jenga.strategies.pools import Chunks, Partitions, Pool, Shape, TwoLevel
from jenga.strategies.runs import FreeRuns

GROUPS = 3


class PoolMachine(RuleBasedStateMachine):
    """Random requests; the model knows each page's state, its bytes, and in which order pages were released."""

    shape: Shape
    sizes: tuple[int, ...]

    def make(self) -> tuple[Shape, tuple[int, ...]]:
        raise AssertionError("a subclass says which pool")

    @initialize()
    def start(self) -> None:
        self.shape, self.sizes = self.make()
        self.pool: Pool = self.shape.build(self.evicted)
        self.live: set[tuple[int, int]] = set()
        self.cached: dict[tuple[int, int], None] = {}  # oldest first
        self.gone: list[tuple[int, int]] = []

    def evicted(self, group: int, page: int) -> None:
        self.gone.append((group, page))

    def forget_evicted(self) -> None:
        for key in self.gone:
            del self.cached[key]  # only cached pages are evicted, and each once
        self.gone.clear()

    @rule(counts=st.tuples(*[st.integers(0, 4)] * GROUPS), order=st.permutations(range(GROUPS)), data=st.data())
    def request(self, counts: tuple[int, ...], order: list[int], data: st.DataObject) -> None:
        cached = list(self.cached)
        hits = data.draw(st.lists(st.sampled_from(cached), unique=True, max_size=3)) if cached else []
        pins = [[p for g, p in hits if g == group] for group in range(GROUPS)]
        before = self.pool.usage()
        fits = self.pool.fits(counts, pins)
        assert fits == (self.pool.large_pages_needed(counts, pins) <= self.pool.available)
        assert self.pool.usage() == before, "a question changed the pool"
        if not fits:
            return
        for group, page in hits:
            self.pool.revive(group, page)
            del self.cached[group, page]
            self.live.add((group, page))
        self.pool.expect(counts)
        for group in order:
            for page in self.pool.allocate(group, counts[group]):
                self.forget_evicted()
                assert (group, page) not in self.live | self.cached.keys()
                self.live.add((group, page))
        self.forget_evicted()

    @rule(group=st.integers(0, GROUPS - 1), count=st.integers(0, 4))
    def unannounced(self, group: int, count: int) -> None:
        """Without a question first the pool grants all or nothing."""
        held = len(self.live)
        try:
            pages = self.pool.allocate(group, count)
        except OutOfPagesError:
            self.forget_evicted()
            assert self.pool.usage().groups[group].live == sum(g == group for g, _ in self.live)
            assert len(self.live) == held
            return
        self.forget_evicted()
        assert len(pages) == count
        self.live.update((group, page) for page in pages)

    @rule(counts=st.tuples(*[st.integers(0, 3)] * GROUPS))
    def announced_in_vain(self, counts: tuple[int, ...]) -> None:
        if self.pool.fits(counts):
            self.pool.expect(counts)
            self.forget_evicted()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        group, page = data.draw(st.sampled_from(sorted(self.live)))
        self.pool.tick()
        self.pool.release(group, page, keep)
        self.live.remove((group, page))
        if keep:
            self.cached[group, page] = None

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        group, page = data.draw(st.sampled_from(sorted(self.cached)))
        self.pool.forget(group, page)
        del self.cached[group, page]

    @rule(group=st.integers(-1, GROUPS), page=st.integers(-2, 80))
    def mistakes(self, group: int, page: int) -> None:
        key = (group, page)
        before = self.pool.usage()
        if key not in self.live:
            with pytest.raises(PageError):
                self.pool.release(group, page, True)
        if key not in self.cached:
            with pytest.raises(PageError):
                self.pool.revive(group, page)
            with pytest.raises(PageError):
                self.pool.forget(group, page)
        assert self.pool.usage() == before

    @invariant()
    def books_balance(self) -> None:
        usage = self.pool.usage()
        assert usage.large_pages == self.shape.units
        assert usage.free + usage.reserved + sum(g.large_pages for g in usage.groups) == usage.large_pages
        for group, own in enumerate(usage.groups):
            assert own.live == sum(g == group for g, _ in self.live)
            assert own.cached == sum(g == group for g, _ in self.cached)
            assert own.large_pages == (own.live + own.cached + own.stranded) * self.sizes[group]
        for group, page in self.live:
            assert self.pool.state(group, page) == PageState.LIVE
        for group, page in self.cached:
            assert self.pool.state(group, page) == PageState.CACHED


class PartitionMachine(PoolMachine):
    def make(self) -> tuple[Shape, tuple[int, ...]]:
        shape = Partitions(slots=(6, 9, 4), strides=(256, 384, 128), nulls=(1, 1, 0))
        assert shape.unit_bytes == 128
        return shape, (2, 3, 1)


class ChunkMachine(PoolMachine):
    def make(self) -> tuple[Shape, tuple[int, ...]]:
        return Chunks(units=48, spans=(2, 3, 7), reserved=3), (2, 3, 7)

    @invariant()
    def no_chunk_is_owned_twice(self) -> None:
        taken: set[int] = set(range(3))
        for group, page in self.live | self.cached.keys():
            chunks = set(range(page, page + self.sizes[group]))
            assert not chunks & taken
            assert max(chunks) < 48
            taken |= chunks


TestPartitions = PartitionMachine.TestCase
TestChunks = ChunkMachine.TestCase
TestPartitions.settings = TestChunks.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_chunks_shatter_as_in_the_paper() -> None:
    """256 and 384 bytes in chunks of 128: the gap of a freed small page serves no large one."""
    pool = Chunks(units=9, spans=(2, 3), reserved=0).build()
    small = pool.allocate(0, 4)
    for page in small[::2]:
        pool.release(0, page, False)
    assert pool.usage().free == 5
    assert not pool.fits([0, 2])
    with pytest.raises(OutOfPagesError, match="group 1 asks for 1 pages of 3 adjacent chunks: 5 chunks are free"):
        pool.allocate(1, 1)
    exact = TwoLevel(units=3, ratios=(3, 2), reserved=0)  # large pages of 768
    assert exact.holds([3, 4])
    assert not exact.holds([4, 4])


def test_partitions_do_not_lend() -> None:
    pool = Partitions(slots=(3, 3), strides=(10, 20), nulls=(1, 1)).build()
    assert not pool.fits([3, 0])
    assert pool.fits([2, 2])
    pool.allocate(0, 2)
    with pytest.raises(OutOfPagesError):
        pool.allocate(0, 1)
    usage = pool.usage()
    assert (usage.free, usage.reserved) == (0, 3)
    assert [g.stranded for g in usage.groups] == [0, 2]


def test_least_recently_used_goes_first() -> None:
    gone: list[tuple[int, int]] = []
    pool = Chunks(units=8, spans=(2, 4), reserved=0).build(lambda g, p: gone.append((g, p)))
    first, second, third, fourth = pool.allocate(0, 4)
    for page in (second, first, fourth, third):
        pool.release(0, page, True)
    pool.allocate(1, 1)
    assert gone == [(0, second), (0, first)]
    assert pool.counters().evicted_pages == (2, 0)


def test_runs_merge_and_split() -> None:
    runs = FreeRuns(0, 10)
    assert runs.take(11) is None
    runs.claim(4, 2)
    assert runs.free == 8
    assert runs.pack([(4, 2)]) == ([[0, 6]], 0)
    assert runs.pack([(5, 1)]) == ([[]], 5)
    assert runs.pack([(3, 1), (1, 5)]) == ([[0], [3, 6, 7, 8, 9]], 0)
    assert runs.free == 8  # packing takes nothing
    runs.give(4, 2)
    assert runs.pack([(10, 1)]) == ([[0]], 0)


def test_hits_stand_in_the_way() -> None:
    """Enough chunks would be free, but the pages that the request's own hits revive lie between them."""
    pool = Chunks(units=8, spans=(2, 4), reserved=0).build()
    pages = sorted(pool.allocate(0, 4))
    for page in pages:
        pool.release(0, page, True)
    assert pool.fits([0, 1], [[pages[1]], []])
    assert not pool.fits([0, 1], [pages[1:3], []])
