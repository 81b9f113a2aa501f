"""The prefix cache against a plain model: what a page holds is what was last written to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jenga.allocator import EvictCallback, OutOfPagesError, PageState, TwoLevelAllocator
from jenga.policies import FullAttention, LayerPolicy, RecurrentState, SlidingWindow
from jenga.prefix_cache import PrefixCache, RequestError, UnknownRequestError
from jenga.traces import TraceRequest

PASS = 2
"""Tokens; prompts of these tests are short: if a pass cost what it does, none would pause for a state."""


@dataclass(frozen=True)
class Group:
    policy: LayerPolicy
    page_tokens: int


MODELS = {
    "full": ([Group(FullAttention(), 4)], [3]),
    "window": ([Group(SlidingWindow(10), 4), Group(FullAttention(), 8)], [5, 2]),
    "state": ([Group(RecurrentState(), 8), Group(FullAttention(), 4)], [1, 6]),
    "two full": ([Group(FullAttention(), 4), Group(FullAttention(), 8), Group(RecurrentState(), 8)], [4, 2, 1]),
    "all": ([Group(RecurrentState(), 4), Group(SlidingWindow(9), 4), Group(FullAttention(), 4)], [2, 3, 4]),
}


def request(serial: int, shared: int, tokens: int, output: int, family: int = 0) -> TraceRequest:
    """`shared` blocks of 4 tokens are the same for all of a family."""
    total = -(-tokens // 4)
    common = min(shared, total)
    blocks = tuple(1000 * family + i for i in range(common)) + tuple(
        10**6 * (serial + 1) + i for i in range(common, total)
    )
    return TraceRequest(serial, 0.0, tokens, output, blocks, 4, tokens)


class CacheMachine(RuleBasedStateMachine):
    """Random requests on a small pool."""

    @initialize(model=st.sampled_from(sorted(MODELS)), pages=st.integers(8, 40), free=st.booleans())
    def start(self, model: str, pages: int, free: bool) -> None:
        self.groups, ratios = MODELS[model]
        self.evicted: set[tuple[int, int]] = set()

        def pool(evict: EvictCallback) -> TwoLevelAllocator:
            def record(group: int, page: int) -> None:
                self.evicted.add((group, page))
                evict(group, page)

            return TwoLevelAllocator(pages, ratios, reserved=1, on_evict=record)

        self.cache = PrefixCache(self.groups, pool, free_unreachable=free, pass_tokens=PASS)
        self.pool: TwoLevelAllocator = self.cache.pool  # type: ignore[assignment]
        self.free = free
        self.before: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (group, key): the same of all it stands behind
        self.pool.forget = self.forget  # type: ignore[method-assign]
        self.contents: dict[tuple[int, int], Any] = {}
        self.requests: dict[int, tuple[TraceRequest, list[list[int]], int]] = {}
        self.serial = 0

    # -- the model ------------------------------------------------------------------------------------------

    def brute_force_hit(self, keys: list[list[int]], limit: int) -> int:
        indexes = self.cache.snapshot_index()
        return max(
            n
            for n in range(0, limit + 1, self.cache.alignment)
            if all(
                g.policy.usable(n // g.page_tokens, lambda i, a=index, k=own: k[i] in a, g.page_tokens)
                for g, index, own in zip(self.groups, indexes, keys, strict=True)
            )
        )

    def forget(self, group: int, page: int) -> None:
        assert self.free
        assert self.cut_off(group, self.contents[group, page]), "it could be reached"
        TwoLevelAllocator.forget(self.pool, group, page)
        assert self.pool.state(group, page) == PageState.FREE

    def cut_off(self, group: int, key: int) -> list[tuple[int, int]]:
        """Pages of full attention before this one that are not cached."""
        indexes = self.cache.snapshot_index()
        return [(g, k) for g, k in self.before[group, key] if k not in indexes[g]]

    def learn(self, keys: list[list[int]]) -> None:
        """What a hit needs of full attention up to the end of each page; at the same end earlier groups come first."""
        sizes = [g.page_tokens for g in self.groups]
        dense = [g for g, group in enumerate(self.groups) if isinstance(group.policy, FullAttention)]
        for g, size in enumerate(sizes):
            for i, key in enumerate(keys[g]):
                mine = ((i + 1) * size, g if g in dense else len(sizes))
                self.before[g, key] = [
                    (h, k) for h in dense for j, k in enumerate(keys[h]) if ((j + 1) * sizes[h], h) < mine
                ]

    def write(self, serial: int, before: int, tokens: int, indexed: tuple[set[int], ...]) -> None:
        """The step's kernels write; nobody else may depend on what they overwrite."""
        _, keys, _ = self.requests[serial]
        for g, group in enumerate(self.groups):
            size = group.page_tokens
            held = self.cache.pages(serial, g)
            first = before // size if group.policy.token_pages else (tokens - 1) // size
            for i in range(first, -(-tokens // size)):
                page = held[i]
                assert page not in indexed[g], f"page {page} of group {g} was overwritten while it could serve hits"
                others = [r for r in self.requests if r != serial and page in self.cache.pages(r, g).values()]
                assert not others, f"page {page} of group {g} is also held by {others}"
                done = tokens % size == 0 if not group.policy.token_pages else (i + 1) * size <= tokens
                self.contents[g, page] = keys[g][i] if done else ("partial", serial, i)

    def grow(self, serial: int, tokens: int) -> None:
        before = self.cache.computed(serial)
        indexed = self.cache.snapshot_index()
        self.evicted.clear()
        self.cache.grow(serial, tokens)
        after = self.cache.snapshot_index()
        still = tuple(  # not evicted for this, nor given up
            {page for key, page in old.items() if new.get(key) == page and (g, page) not in self.evicted}
            for g, (old, new) in enumerate(zip(indexed, after, strict=True))
        )
        self.write(serial, before, tokens, still)
        self.cache.end_step()

    # -- rules ----------------------------------------------------------------------------------------------

    @rule(
        shared=st.integers(0, 20), tokens=st.integers(1, 70), output=st.integers(0, 30), family=st.integers(0, 1),
        chunk=st.sampled_from([5, 16, 64]),
    )  # fmt: skip
    def arrive(self, shared: int, tokens: int, output: int, family: int, chunk: int) -> None:
        self.serial += 1
        trace = request(self.serial, shared, tokens, output, family)
        keys = [trace.keys(g.page_tokens) for g in self.groups]
        self.learn(keys)
        match = self.cache.lookup(keys, tokens - 1)
        assert match.hit.tokens == self.brute_force_hit(keys, tokens - 1)
        for g, held in enumerate(match.pages):
            for i, page in held.items():
                assert self.contents[g, page] == keys[g][i], "a hit would read other contents"
        if not self.cache.fits(match, tokens, chunk):
            return
        self.cache.admit(self.serial, keys, match, tokens)
        self.requests[self.serial] = (trace, keys, trace.tokens)
        start = self.cache.computed(self.serial)
        while (done := self.cache.computed(self.serial)) < tokens:
            try:
                self.grow(self.serial, self.cache.next_stop(self.serial, min(tokens, done + chunk)))
            except OutOfPagesError:
                # Windows that slide can leave large pages partly used, so only all at once is sure to fit.
                assert done > start
                self.cache.release(self.serial)
                del self.requests[self.serial]
                return

    @rule(shared=st.integers(0, 20), tokens=st.integers(1, 70), family=st.integers(0, 1))
    def wait(self, shared: int, tokens: int, family: int) -> None:
        """What a waiting request will find is the last to be evicted."""
        self.serial += 1
        trace = request(self.serial, shared, tokens, 0, family)
        keys = [trace.keys(g.page_tokens) for g in self.groups]
        found = self.cache.lookup(keys, tokens - 1)
        usage, indexes = self.pool.usage(), self.cache.snapshot_index()
        self.cache.refresh(keys, tokens - 1)
        assert (self.pool.usage(), self.cache.snapshot_index()) == (usage, indexes)
        for g, pages in enumerate(found.pages):
            for page in pages.values():
                cached = self.pool.released(page // self.pool.ratios[g])
                others = {p for p in cached if p not in pages.values()}
                assert page not in cached or all(cached[p] < cached[page] for p in others)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 9))
    def decode(self, data: st.DataObject, count: int) -> None:
        serial = data.draw(st.sampled_from(sorted(self.requests)))
        trace, _, _ = self.requests[serial]
        for _ in range(count):
            tokens = self.cache.computed(serial) + 1
            if tokens > trace.tokens:
                return
            if tokens <= self.cache.room(serial):
                before, indexed = tokens - 1, tuple(set(i.values()) for i in self.cache.snapshot_index())
                self.cache.advance(serial, tokens)
                self.write(serial, before, tokens, indexed)
                continue
            usage, held = self.pool.usage(), [self.cache.pages(serial, g) for g in range(len(self.groups))]
            try:
                self.grow(serial, tokens)
            except OutOfPagesError:
                assert self.pool.usage() == usage
                assert [self.cache.pages(serial, g) for g in range(len(self.groups))] == held
                self.release(data)
                return

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        serial = data.draw(st.sampled_from(sorted(self.requests)))
        self.cache.release(serial)
        del self.requests[serial]
        usage = self.pool.usage()
        with pytest.raises(UnknownRequestError, match=str(serial)):
            self.cache.release(serial)
        assert self.pool.usage() == usage

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def admit_twice(self, data: st.DataObject) -> None:
        serial = data.draw(st.sampled_from(sorted(self.requests)))
        trace, keys, _ = self.requests[serial]
        match = self.cache.lookup(keys, trace.prompt_tokens - 1)
        usage = self.pool.usage()
        with pytest.raises(RequestError, match=str(serial)):
            self.cache.admit(serial, keys, match, trace.prompt_tokens)
        assert self.pool.usage() == usage

    # -- what must always hold ------------------------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.pool.check()
        usage = self.pool.usage()
        for g, index in enumerate(self.cache.snapshot_index()):
            holders = Counter(p for r in self.requests for p in self.cache.pages(r, g).values())
            assert usage.groups[g].live == len(holders), "live pages are those that requests hold"
            assert usage.groups[g].cached == sum(1 for p in index.values() if p not in holders)
            assert len(set(index.values())) == len(index)
            for key, page in index.items():
                assert self.contents[g, page] == key
                wanted = PageState.LIVE if page in holders else PageState.CACHED
                assert self.pool.state(g, page) == wanted

    @invariant()
    def what_is_cached_can_be_reached(self) -> None:
        if getattr(self, "free", False):
            for g, index in enumerate(self.cache.snapshot_index()):
                for key in index:
                    assert not self.cut_off(g, key), f"group {g}: {key} is cached, what it stands behind is not"

    @invariant()
    def requests_have_what_they_need(self) -> None:
        for serial, (_, keys, _) in getattr(self, "requests", {}).items():
            computed = self.cache.computed(serial)
            for g, group in enumerate(self.groups):
                held, size = self.cache.pages(serial, g), group.page_tokens
                for i in range(group.policy.resident_from(computed, size), -(-computed // size)):
                    whole = computed % size == 0 if not group.policy.token_pages else (i + 1) * size <= computed
                    expected = keys[g][i] if whole else ("partial", serial, i)
                    assert self.contents[g, held[i]] == expected

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for serial in list(self.requests):
                self.cache.release(serial)
            self.requests.clear()
            self.books_balance()
            assert all(group.live == 0 for group in self.pool.usage().groups)


CacheMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCacheMachine = CacheMachine.TestCase


def test_a_checkpoint_gives_way_to_the_request_that_made_it() -> None:
    """With room for one state only, the state moves on; with room for two, one stays for the next request."""
    groups, _ = MODELS["state"]
    for large_pages, hit in ((4, 0), (5, 24)):
        cache = PrefixCache(
            groups, lambda evicted, n=large_pages: TwoLevelAllocator(n, [1, 6], on_evict=evicted), pass_tokens=PASS
        )
        trace = request(1, 0, 30, 0)
        keys = [trace.keys(g.page_tokens) for g in groups]
        match = cache.lookup(keys, 29)
        assert cache.fits(match, 30, 64)
        cache.admit(1, keys, match, 30)
        assert cache.next_stop(1, 30) == 24
        for tokens in (24, 30):
            cache.grow(1, tokens)
            cache.end_step()
        cache.release(1)
        assert cache.lookup(keys, 29).hit.tokens == hit


def test_what_stays_of_a_window_fills_slots_beside_others() -> None:
    """Four prompts of 40 pages slide through a window of 4: the last pages of all share large pages of 8."""
    allocator = TwoLevelAllocator(40, [8], reserved=0)
    cache = PrefixCache([Group(SlidingWindow(64), 16)], lambda _: allocator)
    for request in range(4):
        cache.admit(request, [[]], cache.no_match(), 640)
        cache.grow(request, 640)
        cache.end_step()
    held = [page for request in range(4) for page in cache.pages(request, 0).values()]
    assert len(held) == 4 * 4
    assert len({page // 8 for page in held}) == 2
    assert allocator.usage().groups[0].stranded == 0


def test_computing_pauses_for_a_state_only_where_that_spares_more_than_a_pass() -> None:
    groups = [Group(RecurrentState(), 16), Group(FullAttention(), 16)]
    cache = PrefixCache(groups, lambda evicted: TwoLevelAllocator(400, [1, 6], on_evict=evicted))
    for serial, (tokens, stop) in enumerate(((250, 250), (300, 288))):
        trace = request(serial, 0, tokens, 0)
        keys = [trace.keys(g.page_tokens) for g in groups]
        cache.admit(serial, keys, cache.lookup(keys, tokens - 1), tokens)
        assert cache.next_stop(serial, tokens) == stop


PROMPTS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 70), st.integers(0, 1)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(model=st.sampled_from(sorted(MODELS)), prompts=PROMPTS)
def test_a_prompt_leaves_what_was_foretold(model: str, prompts: list[tuple[int, int, int]]) -> None:
    groups, ratios = MODELS[model]
    cache = PrefixCache(groups, lambda evicted: TwoLevelAllocator(2000, ratios, on_evict=evicted), pass_tokens=PASS)
    for serial, (shared, tokens, family) in enumerate(prompts):
        trace = request(serial, shared, tokens, 0, family)
        keys = [trace.keys(g.page_tokens) for g in groups]
        match = cache.lookup(keys, tokens - 1)
        foretold = cache.leaves(keys, match.hit, tokens)
        for left, own, group in zip(foretold, keys, groups, strict=True):
            assert len(set(left)) == len(left)
            assert not set(left) & set(own[: match.hit.tokens // group.page_tokens]), "that is stored already"
        before = cache.snapshot_index()
        cache.admit(serial, keys, match, tokens)
        while (done := cache.computed(serial)) < tokens:
            cache.grow(serial, cache.next_stop(serial, min(tokens, done + 64)))
            cache.end_step()
        for left, old, new in zip(foretold, before, cache.snapshot_index(), strict=True):
            assert new.keys() - old.keys() == set(left) - old.keys()
        cache.release(serial)
