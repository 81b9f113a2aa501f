"""The allocator against a plain model that keeps one dict of pages and counts everything anew for every answer."""

import copy
import pickle
from itertools import permutations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from jenga.allocator import (
    PRESSED,
    RESERVED,
    SCARCE,
    UNOWNED,
    OutOfPagesError,
    PageError,
    PageState,
    TwoLevelAllocator,
)

LIVE = "live"


def books(pool):
    """Everything the allocator knows, order included."""
    state = {k: v for k, v in vars(pool).items() if k not in ("_groups", "_on_evict")}
    groups = [{name: getattr(g, name) for name in g.__slots__} for g in pool._groups]
    return pickle.dumps((state, groups))


class Model:
    """What the module's docstring promises.  ``pages[g][s]`` is LIVE, or the time at which cached page s was released;
    free pages are not in it.  ``beside[g][n]`` are the companions of large page n, the lead of a group."""

    def __init__(self, large_pages, ratios, reserved, widths=None):
        self.large_pages, self.ratios, self.reserved = large_pages, ratios, reserved
        self.widths = widths or [1] * len(ratios)
        self.beside = [{} for _ in ratios]
        self.pages = [{} for _ in ratios]
        self.clock = 0
        self.expected = [0] * len(ratios)
        self.evictable = []  # (large page, time), in the order in which they became so
        self.evicted = [0] * len(ratios)

    def inside(self, g, large):
        r = self.ratios[g]
        return {s: self.pages[g][s] for s in range(large * r, large * r + r) if s in self.pages[g]}

    def owned(self, g):
        return sorted({s // self.ratios[g] for s in self.pages[g]})

    def partly_live(self, g):
        return [n for n in self.owned(g) if LIVE in self.inside(g, n).values()]

    def free_large(self):
        taken = {n for g in range(len(self.ratios)) for n in self.taken(g)}
        return set(range(self.reserved, self.large_pages)) - taken

    def taken(self, g):
        """Its leads and their companions."""
        return {n for lead in self.owned(g) for n in (lead, *self.beside[g][lead])}

    def evictable_large(self):
        return sum(1 + len(beside[n]) for n, _ in self.evictable for beside in self.beside if n in beside)

    def available(self):
        return len(self.free_large()) + self.evictable_large()

    def open_slots(self, g):
        r = self.ratios[g]
        return sum(r - list(self.inside(g, n).values()).count(LIVE) for n in self.partly_live(g))

    def spare(self, g):
        spare = self.available()
        for h, ratio in enumerate(self.ratios):
            if h != g:
                spare -= -(-max(0, self.expected[h] - self.open_slots(h)) // ratio) * self.widths[h]
        return spare

    def needed(self, wants, pins):
        """Large pages that would have to become partly live: counted on a copy that holds the pins."""
        twin = copy.deepcopy(self)
        for g, pages in enumerate(pins):
            for s in pages:
                if twin.pages[g].get(s, LIVE) != LIVE:
                    twin.set(g, s, LIVE)
        taken = self.available() - twin.available()
        return taken + sum(
            -(-max(0, want - twin.open_slots(g)) // ratio) * self.widths[g]
            for (g, ratio), want in zip(enumerate(self.ratios), wants, strict=True)
        )

    def stamps(self, g, large):
        return [(t, s) for s, t in self.inside(g, large).items() if t != LIVE]

    def oldest(self, g, large):
        return min(t for t, _ in self.stamps(g, large))

    def set(self, g, page, value):
        """Change one page and keep the order of eviction."""
        large = page // self.ratios[g]
        self.pages[g].pop(page, None)
        if value is not None:
            self.pages[g][page] = value
        now, after = self.inside(g, large), self.stamps(g, large)
        alive = LIVE in now.values()
        listed = large in dict(self.evictable)
        if after and not alive and not listed:
            self.evictable.append((large, self.clock))
        elif listed and (alive or not after):
            self.evictable = [e for e in self.evictable if e[0] != large]
        if not now:
            self.beside[g].pop(large, None)

    def mixed(self, g):
        """The partly live large pages with something cached, with the live pages in each."""
        return {n: list(self.inside(g, n).values()).count(LIVE) for n in self.partly_live(g) if self.stamps(g, n)}

    def evict(self, g, page, events):
        assert events, f"page {page} of group {g} should have been evicted"
        assert events.pop(0) == (g, page), "another page was evicted than the order says"
        self.evicted[g] += 1
        self.set(g, page, None)

    def first_cached(self, g, large):
        """Cached pages keep the order in which they were released (insertion order of the dict)."""
        return next(s for s, t in self.pages[g].items() if t != LIVE and s // self.ratios[g] == large)

    def reuses(self, g, large):
        """Whether step 3 applies, if `large` was chosen: of large pages as full, any may be the one compared."""
        mixed, free = self.mixed(g), len(self.free_large())
        if not mixed or (free * SCARCE > self.large_pages and min(free, self.spare(g)) >= self.widths[g]):
            return False
        if self.spare(g) < self.widths[g] or self.available() * PRESSED <= self.large_pages or not self.evictable:
            return True
        fullest = [n for n, live in mixed.items() if live == max(mixed.values())]
        old = [n for n in fullest if self.pages[g][self.first_cached(g, n)] <= self.evictable[0][1]]
        return large in old or len(old) == len(fullest)

    def own(self, g, large, parts, step):
        """Take a free large page, and as many companions as the group is wide: their parts must be free as well."""
        here = [part // self.ratios[g] for part in parts]
        assert here[0] == large, f"step {step}: the first part is the page itself"
        assert len(here) == len(set(here)) == self.widths[g], f"step {step}: a part in each of as many large pages"
        assert set(here) <= self.free_large(), f"step {step}: not a free large page"
        self.beside[g][large] = tuple(here[1:])

    def grant(self, g, pages, parts, events):
        """Follow the steps of the docstring and check that `pages`, each with its `parts`, and the evictions are what
        they say."""
        ratio, width = self.ratios[g], self.widths[g]
        left = list(zip(pages, parts, strict=True))
        while len(left) >= ratio and len(self.free_large()) >= width <= self.spare(g):
            large = left[0][0] // ratio
            self.own(g, large, left[0][1], step=1)
            for s in range(large * ratio, large * ratio + ratio):
                assert left.pop(0)[0] == s, "step 1: not the whole large page"
                self.set(g, s, LIVE)
        for s, where in left:
            self.share(g, s, where, events)
            assert s not in self.pages[g], f"page {s} of group {g} was granted twice"
            self.set(g, s, LIVE)
        for s, where in zip(pages, parts, strict=True):
            expected = [n * ratio + s % ratio for n in (s // ratio, *self.beside[g][s // ratio])]
            assert list(where) == expected, f"the parts of page {s} lie elsewhere"
        assert not events, f"evicted without need: {events}"
        self.expected[g] = max(0, self.expected[g] - len(pages))

    def share(self, g, s, parts, events):
        ratio, width = self.ratios[g], self.widths[g]
        large = s // ratio
        with_slot = [n for n in self.owned(g) if len(self.inside(g, n)) < ratio]
        live = {n: list(self.inside(g, n).values()).count(LIVE) for n in with_slot}
        mixed = self.mixed(g)
        most = max(mixed.values(), default=0)
        if most > max(live.values(), default=0) > 0 and self.available() * SCARCE <= self.large_pages:
            assert mixed.get(large) == most, "step 2: not the fullest with something cached"
            self.evict(g, self.first_cached(g, large), events)
        elif any(live.values()):
            assert live.get(large) == max(live.values()), "step 2: not a slot of the fullest"
        elif self.reuses(g, large):
            assert mixed.get(large) == most, "step 3: not the fullest with something cached"
            self.evict(g, self.first_cached(g, large), events)
        elif len(self.free_large()) >= width:
            self.own(g, large, parts, step=4)
        elif with_slot:
            assert large in with_slot, "step 5: not an evictable large page of the group with a free slot"
        else:
            oldest, _ = self.evictable[0]
            owner = next(h for h in range(len(self.ratios)) if oldest in self.owned(h))
            victims = [v for v, _ in self.pages[owner].items() if v // self.ratios[owner] == oldest]
            companions = self.beside[owner][oldest]
            for v in victims[:1] if owner == g else victims:
                self.evict(owner, v, events)
            if owner != g:
                self.share(g, s, parts, events)  # a wide group may need another
                return
            self.beside[g][oldest] = companions
            assert large == oldest, "step 6: not the large page that has been evictable longest"


def allocate_all(pool, order, wants):
    for g in order:
        pool.allocate(g, wants[g])


class AllocatorMachine(RuleBasedStateMachine):
    pool_class = TwoLevelAllocator

    @initialize(
        large_pages=st.sampled_from([3, 4, 2, 5, 6, 9, 10]),
        ratios=st.lists(st.sampled_from([3, 4, 2, 1]), min_size=1, max_size=3),
        reserved=st.integers(0, 1),
        widths=st.lists(st.sampled_from([1, 1, 2, 3]), min_size=3, max_size=3),
    )
    def start(self, large_pages, ratios, reserved, widths):
        self.events = events = []
        widths = widths[: len(ratios)]
        self.pool = self.pool_class(
            large_pages, ratios, widths=widths, reserved=reserved, on_evict=lambda g, page: events.append((g, page))
        )
        self.model = Model(large_pages, ratios, reserved, widths)

    def group(self, data):
        return data.draw(st.integers(0, len(self.model.ratios) - 1), label="group")

    def pages_in(self, g, state):
        return sorted(s for s, t in self.model.pages[g].items() if (t == LIVE) == (state == PageState.LIVE))

    def unchanged(self, error, words, operation):
        before = books(self.pool)
        with pytest.raises(error, match=words):
            operation()
        assert books(self.pool) == before
        assert not self.events

    def grant(self, g, count):
        pages = self.pool.allocate(g, count)
        assert len(pages) == len(set(pages)) == count
        self.model.grant(g, pages, list(zip(*self.pool.parts(g, pages), strict=True)), self.events)

    @rule(data=st.data())
    def allocate(self, data):
        g = self.group(data)
        most = self.model.open_slots(g) + max(0, self.model.spare(g)) // self.model.widths[g] * self.model.ratios[g]
        free = (len(self.model.free_large()) + 1) * self.model.ratios[g]
        # Few pages, all that is free and something beyond, or more than there is.
        few = st.integers(0, 3)
        count = data.draw(few | few.map(free.__add__) | few.map((most - 1).__add__).map(abs), label="count")
        if count <= most:
            self.grant(g, count)
        else:
            self.unchanged(
                OutOfPagesError, f"group {g} asks for {count} small pages", lambda: self.pool.allocate(g, count)
            )

    @rule(data=st.data())
    def expect(self, data):
        self.model.expected = [data.draw(st.integers(0, r + 1), label="expected") for r in self.model.ratios]
        self.pool.expect(self.model.expected)

    @rule()
    def expect_nothing(self):
        self.model.expected = [0] * len(self.model.ratios)
        self.pool.expect(self.model.expected)

    @rule(data=st.data())
    def admit(self, data):
        groups = range(len(self.model.ratios))
        pins = [
            data.draw(st.lists(st.sampled_from(held), unique=True, max_size=4), label="pins") if held else []
            for held in (sorted(self.model.pages[g]) for g in groups)
        ]
        wants = [data.draw(st.integers(0, 2 * r + 1), label="wants") for r in self.model.ratios]
        before = books(self.pool)
        needed = self.pool.large_pages_needed(wants, pins)
        fits = self.pool.fits(wants, pins)
        assert books(self.pool) == before, "a question changed the books"
        assert needed == self.model.needed(wants, pins)
        assert fits == (needed <= self.model.available())
        order = data.draw(st.permutations(groups), label="order")
        cut = data.draw(st.booleans(), label="in two calls")
        if not fits:
            self.refuses(wants, pins)
            return
        for g in groups:
            for s in pins[g]:
                if self.model.pages[g][s] != LIVE:
                    self.pool.revive(g, s)
                    self.model.set(g, s, LIVE)
        self.pool.expect(wants)
        self.model.expected = list(wants)
        for g in order:
            for count in (wants[g] // 2, wants[g] - wants[g] // 2) if cut else (wants[g],):
                self.grant(g, count)

    def refuses(self, wants, pins):
        """Whatever the order, somebody's call fails."""
        for order in permutations(range(len(wants))):
            twin = copy.deepcopy(self.pool)
            for g, pages in enumerate(pins):
                for s in pages:
                    if twin.state(g, s) == PageState.CACHED:
                        twin.revive(g, s)
            twin._on_evict = None
            twin.expect([0] * len(wants))
            with pytest.raises(OutOfPagesError):
                allocate_all(twin, order, wants)

    @rule(data=st.data(), keep=st.sampled_from([True, True, False]), tick=st.sampled_from([True, True, False]))
    def release(self, data, keep, tick):
        if tick:
            self.tick()
        g = self.group(data)
        live = self.pages_in(g, PageState.LIVE)
        for page in data.draw(st.lists(st.sampled_from(live), unique=True, max_size=6), label="pages") if live else []:
            self.pool.release(g, page, keep)
            self.model.set(g, page, self.model.clock if keep else None)

    @rule(data=st.data(), keep=st.booleans())
    def release_run(self, data, keep):
        """Live pages of one large page at once: the same as one after the other."""
        g = self.group(data)
        if not (live := self.pages_in(g, PageState.LIVE)):
            return
        ratio = self.model.ratios[g]
        large = data.draw(st.sampled_from(live), label="page") // ratio
        mine = [page for page in live if page // ratio == large]
        pages = data.draw(st.lists(st.sampled_from(mine), unique=True, min_size=1), label="pages")
        others = [page for page in range(self.model.large_pages * ratio) if page not in mine]
        for wrong in {pages[0], *others[:2], *others[-2:]}:
            words = f"small page {wrong} of group {g} is|named twice"
            self.unchanged(PageError, words, lambda bad=wrong: self.pool.release_run(g, [*pages, bad], keep))
        self.pool.release_run(g, pages, keep)
        for page in pages:
            self.model.set(g, page, self.model.clock if keep else None)

    @rule(data=st.data())
    def revive(self, data):
        g = self.group(data)
        if cached := self.pages_in(g, PageState.CACHED):
            page = data.draw(st.sampled_from(cached), label="page")
            self.pool.revive(g, page)
            self.model.set(g, page, LIVE)

    @rule(data=st.data())
    def revive_run(self, data):
        """Cached pages of one large page at once: the same as one after the other."""
        g = self.group(data)
        if not (cached := self.pages_in(g, PageState.CACHED)):
            return
        ratio = self.model.ratios[g]
        large = data.draw(st.sampled_from(cached), label="page") // ratio
        mine = [page for page in cached if page // ratio == large]
        pages = data.draw(st.lists(st.sampled_from(mine), unique=True, min_size=1), label="pages")
        others = [page for page in range(self.model.large_pages * ratio) if page not in mine]
        for wrong in {pages[0], *others[:2], *others[-2:]}:
            words = f"small page {wrong} of group {g} is|named twice"
            self.unchanged(PageError, words, lambda bad=wrong: self.pool.revive_run(g, [*pages, bad]))
        self.pool.revive_run(g, pages)
        for page in pages:
            self.model.set(g, page, LIVE)

    @rule(data=st.data())
    def forget(self, data):
        g = self.group(data)
        if cached := self.pages_in(g, PageState.CACHED):
            page = data.draw(st.sampled_from(cached), label="page")
            self.pool.forget(g, page)
            self.model.set(g, page, None)

    @rule()
    def tick(self):
        self.pool.tick()
        self.model.clock += 1

    @rule(data=st.data())
    def misuse(self, data):
        g = self.group(data)
        page = data.draw(st.integers(0, self.model.large_pages * self.model.ratios[g] - 1), label="page")
        found = self.model.pages[g].get(page)
        state = "free" if found is None else "live" if found == LIVE else "cached"
        words = f"small page {page} of group {g} is {state}, not "
        if state != "live":
            self.unchanged(PageError, words + "live", lambda: self.pool.release(g, page, keep=True))
        if state != "cached":
            self.unchanged(PageError, words + "cached", lambda: self.pool.revive(g, page))
            self.unchanged(PageError, words + "cached", lambda: self.pool.forget(g, page))

    @invariant()
    def same_pages(self):
        if not hasattr(self, "pool"):
            return
        model, pool = self.model, self.pool
        owners = [model.taken(g) for g in range(len(model.ratios))]
        assert sum(map(len, owners)) == len(set().union(*owners)), "two groups share a large page"
        for g, ratio in enumerate(model.ratios):
            for s in range(model.large_pages * ratio):
                stamp = model.pages[g].get(s)
                state = PageState.FREE if stamp is None else PageState.LIVE if stamp == LIVE else PageState.CACHED
                assert pool.state(g, s) == state, f"page {s} of group {g}"
        for large in range(model.large_pages):
            assert pool.owner(large) == next((g for g, o in enumerate(owners) if large in o), None)

    @invariant()
    def same_map(self):
        """What the memory map copies of the books says the same as the model."""
        if not hasattr(self, "pool"):
            return
        model, pool = self.model, self.pool
        owners, states = pool.map()
        expected = [UNOWNED] * model.large_pages
        expected[: model.reserved] = [RESERVED] * model.reserved
        for g, ratio in enumerate(model.ratios):
            assert len(states[g]) == model.large_pages * ratio
            leads = {n: lead for lead in model.owned(g) for n in (lead, *model.beside[g][lead])}
            for s, state in enumerate(states[g]):
                stamp = model.pages[g].get(leads.get(s // ratio, s // ratio) * ratio + s % ratio)
                assert state == (0 if stamp is None else 1 if stamp == LIVE else 2), f"page {s} of group {g}"
            for large, lead in leads.items():
                expected[large] = g
                assert pool.lead(large) == lead, f"lead of large page {large}"
            for large in model.owned(g):
                cached = {s: t for s, t in model.inside(g, large).items() if t != LIVE}
                assert pool.released(large) == cached, f"last uses in large page {large}"
        assert list(memoryview(owners).cast("b")) == expected
        assert pool.clock == model.clock

    @invariant()
    def same_sums(self):
        if not hasattr(self, "pool"):
            return
        model, usage = self.model, self.pool.usage()
        assert self.pool.available == usage.free + usage.evictable == model.available()
        assert (usage.free, usage.evictable) == (len(model.free_large()), model.evictable_large())
        assert usage.free + usage.reserved + sum(g.large_pages for g in usage.groups) == usage.large_pages
        for g, (ratio, group) in enumerate(zip(model.ratios, usage.groups, strict=True)):
            assert group.live == len(self.pages_in(g, PageState.LIVE))
            assert group.cached == len(self.pages_in(g, PageState.CACHED))
            assert (group.live + group.cached + group.stranded) * model.widths[g] == ratio * group.large_pages
            assert group.large_pages == len(model.taken(g))
        assert self.pool.counters().evicted_pages == tuple(model.evicted)

    @invariant()
    def books_balance(self):
        if hasattr(self, "pool"):
            self.pool.check()


class TestAllocator(AllocatorMachine.TestCase):
    settings = settings(
        max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
    )


# -- the machine can fail: every one of these faults is found ------------------------------------------------------


class GrantsTwice(TwoLevelAllocator):
    def _take_slots(self, g, large, count):
        pages = super()._take_slots(g, large, count)
        if self._slots[large]:
            self._slots[large].insert(0, pages[0])
        return pages


class LosesReturnedPages(TwoLevelAllocator):
    def _return_large(self, g, large):
        super()._return_large(g, large)
        if large % 3 == 2:
            self._free.remove(large)


class MiscountsOpenSlots(TwoLevelAllocator):
    def _carve(self, index, g):
        g.open_slots += 1
        return super()._carve(index, g)


class ForgetsToCountRevivedSlots(TwoLevelAllocator):
    def revive(self, group, page):
        super().revive(group, page)
        self._groups[group].open_slots -= 1


class EmptiestFirst(TwoLevelAllocator):
    def _grant_shared(self, index, g, count):
        shared = g.mask & ~1
        if shared:
            return self._take_slots(g, next(iter(g.partial[(shared & -shared).bit_length() - 1])), count)
        return super()._grant_shared(index, g, count)


class NewestEvictableFirst(TwoLevelAllocator):
    def release_run(self, group, pages, keep):
        super().release_run(group, pages, keep)
        large = pages[0] // self.ratios[group]
        if large in self._evictable:
            self._evictable.move_to_end(large, last=False)


class EmptiestMixedFirst(TwoLevelAllocator):
    def _grant_shared(self, index, g, count):
        mask = g.mixed_mask
        if mask and not g.mask & ~1 and len(self._free) * SCARCE <= self.large_pages:
            return self._reuse_cached(index, g, next(iter(g.mixed[(mask & -mask).bit_length() - 1])), count)
        return super()._grant_shared(index, g, count)


class SparesWhatIsBesideLivePages(TwoLevelAllocator):
    def _grant_shared(self, index, g, count):
        kept, g.mixed_mask = g.mixed_mask, 0 if self._spare(index) > 0 else g.mixed_mask
        try:
            return super()._grant_shared(index, g, count)
        finally:
            g.mixed_mask |= kept


class ReusesCachedPagesOfAnyAge(TwoLevelAllocator):
    def _as_old(self, large, stamp, most):
        return most


class ReusesOnlyOlderPages(TwoLevelAllocator):
    def _as_old(self, large, stamp, most):
        return super()._as_old(large, stamp - 1, most)


class SharesBeforeWholePages(TwoLevelAllocator):
    def allocate(self, group, count):
        return [page for _ in range(count) for page in super(SharesBeforeWholePages, self).allocate(group, 1)]


class IgnoresPins(TwoLevelAllocator):
    def large_pages_needed(self, pages, pins=()):
        return super().large_pages_needed(pages)


class IgnoresExpectations(TwoLevelAllocator):
    def expect(self, pages):
        super().expect([0] * len(pages))


class KeepsNothing(TwoLevelAllocator):
    def release(self, group, page, keep):
        super().release(group, page, False)


class SwallowsDoubleFrees(TwoLevelAllocator):
    def release(self, group, page, keep):
        if self.state(group, page) == PageState.LIVE:
            super().release(group, page, keep)


class EvictsSilently(TwoLevelAllocator):
    def _evict_large(self, large):
        callback, self._on_evict = self._on_evict, None
        super()._evict_large(large)
        self._on_evict = callback


class ForgetsTheRestOfARun(TwoLevelAllocator):
    def release_run(self, group, pages, keep):
        super().release_run(group, pages[:1], keep)


class TakesRunsBackwards(TwoLevelAllocator):
    def release_run(self, group, pages, keep):
        super().release_run(group, pages[::-1], keep)


class CountsARunAsOne(TwoLevelAllocator):
    def release_run(self, group, pages, keep):
        super().release_run(group, pages, keep)
        if self._live[pages[0] // self.ratios[group]]:
            self._groups[group].open_slots -= len(pages) - 1


class SwallowsBadRuns(TwoLevelAllocator):
    def _require_run(self, group, pages, wanted):
        return super()._require_run(group, pages[:1], wanted)


class RevivesTheFirstOfARun(TwoLevelAllocator):
    def revive_run(self, group, pages):
        super().revive_run(group, pages[:1])


class LosesCompanions(TwoLevelAllocator):
    def _return_large(self, g, large):
        others = self._companions(g, large)
        super()._return_large(g, large)
        if others:
            self._free.remove(others[-1])


class SharesCompanions(TwoLevelAllocator):
    """A second lead gets the companions of the first."""

    def _own(self, index, g):
        first = next((lead for lead in g.beside if lead >= self.reserved), None)
        large = super()._own(index, g)
        if first is not None:
            g.beside[large] = tuple((n - large) * g.ratio for n in self._companions(g, first))
        return large


class CountsCompanionsAsGone(TwoLevelAllocator):
    """Evictable large pages count as one each, however wide the group."""

    @property
    def available(self):
        return len(self._free) + len(self._evictable)


class NeedsOneLargePageEach(TwoLevelAllocator):
    def large_pages_needed(self, pages, pins=()):
        widths = [g.width for g in self._groups]
        for g in self._groups:
            g.width = 1
        try:
            return super().large_pages_needed(pages, pins)
        finally:
            for g, width in zip(self._groups, widths, strict=True):
                g.width = width


class EvictsBeforeItMust(TwoLevelAllocator):
    def _grant_shared(self, index, g, count):
        if g.mixed_mask:
            return self._reuse_cached(index, g, next(iter(g.mixed[g.mixed_mask.bit_length() - 1])), count)
        return super()._grant_shared(index, g, count)


MUTANTS = [
    GrantsTwice,
    LosesReturnedPages,
    MiscountsOpenSlots,
    ForgetsToCountRevivedSlots,
    EmptiestFirst,
    NewestEvictableFirst,
    EmptiestMixedFirst,
    SparesWhatIsBesideLivePages,
    ReusesCachedPagesOfAnyAge,
    ReusesOnlyOlderPages,
    SharesBeforeWholePages,
    IgnoresPins,
    IgnoresExpectations,
    KeepsNothing,
    SwallowsDoubleFrees,
    EvictsSilently,
    ForgetsTheRestOfARun,
    TakesRunsBackwards,
    CountsARunAsOne,
    SwallowsBadRuns,
    RevivesTheFirstOfARun,
    LosesCompanions,
    SharesCompanions,
    CountsCompanionsAsGone,
    NeedsOneLargePageEach,
    EvictsBeforeItMust,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_the_model_finds_the_fault(mutant):
    # Without the allocator's own `check`: the model alone must see it.
    blind = type(mutant.__name__, (mutant,), {"check": lambda self: None})
    machine = type("Machine", (AllocatorMachine,), {"pool_class": blind})
    thorough = settings(
        max_examples=8000,  # ends at the first fault; what is drawn depends on the modules that are loaded
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    lookups = (KeyError, IndexError, ValueError, StopIteration)
    broken = (AssertionError, *lookups, OutOfPagesError, PageError, pytest.fail.Exception)
    with pytest.raises(broken):
        run_state_machine_as_test(machine, settings=thorough)


@pytest.mark.parametrize("mutant", [GrantsTwice, LosesReturnedPages, MiscountsOpenSlots, ForgetsToCountRevivedSlots])
def test_check_finds_unbalanced_books(mutant):
    def use(pool):
        pages = pool.allocate(0, 3)
        pool.check()
        for page in pages:
            pool.release(0, page, keep=True)
        pool.revive(0, pages[0])
        pool.check()
        pool.release(0, pages[0], keep=False)
        for page in pages[1:]:
            pool.forget(0, page)
        pool.check()

    use(TwoLevelAllocator(6, [4, 2], reserved=2))
    with pytest.raises(AssertionError):
        use(mutant(6, [4, 2], reserved=2))


# -- each step of the order, by hand -------------------------------------------------------------------------------


@pytest.fixture
def evicted():
    return []


@pytest.fixture
def pool(evicted):
    """Two groups, 4 and 2 small pages per large page; large page 0 is reserved, 1 to 5 can be granted."""
    return TwoLevelAllocator(6, [4, 2], on_evict=lambda g, page: evicted.append((g, page)))


def cache(pool, group, pages):
    pool.tick()
    for page in pages:
        pool.release(group, page, keep=True)


def test_step_1_whole_large_pages_for_whole_requests(pool):
    assert pool.allocate(0, 1) == [4]  # large page 1 is shared
    assert pool.allocate(0, 9) == [8, 9, 10, 11, 12, 13, 14, 15, 5]  # 2 and 3 whole, the rest shares 1
    assert pool.counters().whole_page_grants == 2
    for page in range(8, 12):
        pool.release(0, page, keep=False)
    assert pool.owner(2) is None  # and comes back whole


def test_step_2_the_fullest_partly_live_large_page(pool):
    pages = pool.allocate(0, 8)
    for page in (pages[0], pages[1], pages[4]):
        pool.release(0, page, keep=False)
    assert [pool.allocate(0, 1)[0] // 4 for _ in range(3)] == [2, 1, 1]  # 3 live beside 2, then those


def test_step_2_a_fuller_large_page_gives_up_cached_pages_while_requests_wait(pool, evicted):
    first, second, others = pool.allocate(0, 4), pool.allocate(0, 4), pool.allocate(1, 6)
    for page in first[:2]:
        pool.release(0, page, keep=False)
    cache(pool, 0, second[:1])
    assert pool.available == 0
    assert pool.allocate(0, 2) == [second[0], first[1]]
    assert evicted == [(0, second[0])]
    pool.release(1, others[4], keep=False)
    pool.release(1, others[5], keep=False)
    cache(pool, 0, second[1:2])
    assert pool.available == 1
    assert pool.allocate(0, 1) == [first[0]], "nobody waits: what is cached stays"


def test_step_4_a_free_large_page_before_anything_cached(pool, evicted):
    cache(pool, 0, pool.allocate(0, 3))
    assert pool.allocate(0, 1) == [8]
    assert not evicted


def test_step_5_a_free_slot_in_an_evictable_large_page_of_the_group(pool, evicted):
    shared = pool.allocate(0, 3)
    cache(pool, 0, shared)  # evictable, one slot free
    pool.allocate(1, 8)
    assert pool.allocate(0, 1) == [7]
    assert not evicted
    assert [pool.state(0, page) for page in shared] == [PageState.CACHED] * 3


def test_step_6_balanced_eviction_takes_the_oldest_large_page_of_any_group(pool, evicted):
    first, second = pool.allocate(0, 4), pool.allocate(1, 2)
    pool.allocate(1, 6)
    cache(pool, 1, second)
    cache(pool, 0, first)
    assert pool.allocate(0, 1) == [8]  # large page 2, which group 1 gave up first
    assert evicted == [(1, page) for page in second]
    assert pool.counters().evicted_large_pages == 1


@pytest.mark.parametrize(("large_pages", "gone"), [(8, "mixed"), (7, "whole")])
def test_step_3_where_large_pages_are_few_a_page_beside_live_ones_goes_before_a_whole_one(large_pages, gone):
    evicted = []
    pool = TwoLevelAllocator(large_pages, [4, 2], on_evict=lambda g, page: evicted.append((g, page)))
    mixed, whole = pool.allocate(0, 4), pool.allocate(0, 4)
    pool.allocate(1, 2 * (large_pages - 3))
    cache(pool, 0, whole)  # older, but every group can use its large page
    cache(pool, 0, mixed[:1])
    assert pool.available == 1
    expected = mixed[0] if gone == "mixed" else whole[0]
    assert pool.allocate(0, 1) == [expected]
    assert evicted == [(0, expected)]


def test_step_3_a_page_beside_live_ones_goes_if_it_is_older_than_any_large_page():
    evicted = []
    pool = TwoLevelAllocator(5, [4, 1], on_evict=lambda g, page: evicted.append((g, page)))
    mixed, whole = pool.allocate(0, 4), pool.allocate(1, 2)
    pool.allocate(1, 1)
    cache(pool, 0, mixed[:2])
    cache(pool, 1, whole)
    cache(pool, 0, mixed[2:3])
    assert pool.allocate(0, 3)[:2] == mixed[:2]
    assert evicted == [(0, mixed[0]), (0, mixed[1]), (1, whole[0])], "the third is younger: a large page goes"


def test_step_3_the_fullest_large_page_gives_up_cached_pages_first(pool, evicted):
    first, second = pool.allocate(0, 4), pool.allocate(0, 4)
    pool.allocate(1, 6)
    cache(pool, 0, first[:3])
    cache(pool, 0, second[:1])
    assert pool.allocate(0, 2) == [second[0], first[0]]  # so that the emptier one can drain
    pool.release(0, first[0], keep=False)
    pool.release(0, first[3], keep=False)
    assert pool.available == 1


def test_step_6_in_its_own_large_page_a_group_gives_up_one_page_only(pool, evicted):
    pages = pool.allocate(0, 4)
    pool.allocate(1, 8)
    cache(pool, 0, reversed(pages))  # tail first
    assert pool.allocate(0, 1) == [pages[3]]
    assert evicted == [(0, pages[3])]
    assert pool.usage().groups[0].cached == 3


def test_step_3_when_others_expect_the_large_pages_a_group_evicts_from_its_own_slots(pool, evicted):
    mine = pool.allocate(0, 4)
    pool.allocate(1, 6)
    theirs = pool.allocate(1, 2)
    cache(pool, 1, theirs)  # older, but expected by group 1
    cache(pool, 0, mine[:1])
    pool.expect([1, 2])
    assert pool.allocate(0, 1) == mine[:1]
    assert evicted == [(0, mine[0])]
    with pytest.raises(OutOfPagesError, match="0 slots are open, and 0 large pages of 4 are available to it"):
        pool.allocate(0, 1)
    assert len(pool.allocate(1, 2)) == 2


def test_what_a_hit_leaves_behind_keeps_its_age(evicted):
    pool = TwoLevelAllocator(3, [4], on_evict=lambda g, page: evicted.append(page))
    x, y = pool.allocate(0, 4), pool.allocate(0, 4)
    cache(pool, 0, x)
    cache(pool, 0, y[:1])
    pool.revive(0, x[2])  # x is partly live again
    pool.allocate(0, 4)
    assert evicted == [y[0], x[0], x[1], x[3]]  # the fuller large page first, then x in its order


@pytest.mark.parametrize(("group", "page"), [(-1, 8), (2, 8), (0, -1), (0, 24), (1, 12)])
def test_groups_and_pages_that_are_not_there_are_named(pool, group, page):
    pool.allocate(0, 4)
    pool.allocate(1, 4)
    before = books(pool)
    for operation in (pool.revive, pool.forget, pool.state, lambda g, p: pool.release(g, p, keep=False)):
        with pytest.raises(PageError, match=f"no group {group}|group {group} has no small page {page}"):
            operation(group, page)
    assert books(pool) == before


@pytest.mark.parametrize(("group", "count"), [(-1, 1), (2, 1), (0, -1)])
def test_allocations_that_mean_nothing_are_refused(pool, group, count):
    before = books(pool)
    with pytest.raises(PageError, match=f"cannot allocate {count} small pages of group {group}"):
        pool.allocate(group, count)
    with pytest.raises(ValueError, match="3 expectations for 2 groups"):
        pool.expect([1, 1, 1])
    assert books(pool) == before


@pytest.mark.parametrize(
    ("large_pages", "ratios", "words"), [(1, [2], "none is left"), (4, [], "at least one"), (4, [0], "0")]
)
def test_pools_that_cannot_be(large_pages, ratios, words):
    with pytest.raises(ValueError, match=words):
        TwoLevelAllocator(large_pages, ratios)
