"""Two-level page allocator (JENGA, SOSP'25, section 4).

The buffer is cut into *large pages* of one size.  A large page belongs to at most one *group* (layer type) at
a time, which cuts it into ``ratio`` *small pages* of exactly its own size.  Small page ``s`` of a group lies in
large page ``s // ratio``, so kernels address it with a constant stride and need not know any of this.

A small page is *free*, *live* (some request needs it) or *cached* (no request needs it, its contents can
still serve a prefix hit).  A large page without live pages is *available*: free outright, or *evictable* if
something in it is cached.

Where a small page comes from, in this order:

1. requests for at least ``ratio`` pages at once take whole free large pages: these are filled by one request and
   come back whole when it ends.  Everything smaller shares (measured on vLLM: at 130 small pages per
   large one, private large pages cost as much as stock's inflated blocks);
2. a free slot of a partly live large page, the fullest first, so that emptier ones drain and come free.  While at most
   one large page in `SCARCE` is available, requests wait for memory, which counts for more than what is cached: then
   the oldest cached page of a partly live large page that is fuller still;
3. while at most one large page in `SCARCE` is free, or too few for the group: the oldest cached page of the fullest
   partly live large page, if it is at least as old as the large page of step 6.  While at most one in `PRESSED` is
   available, whatever its age: no other group can use it, and every group can use a large page.  (Whatever its age in
   any case, windows and states are gone long before the full attention that they go with: simulated, Gemma-3
   recomputed three times as much as vLLM's one list.  By age in any case, cached pages spread over ever more large
   pages, none of which drains: a fifth of Jamba's buffer);
4. a free large page;
5. a free slot of an evictable large page of the same group;
6. the large page, of any group, that has been evictable longest (balanced eviction: what one layer type keeps beyond
   the others' age cannot be hit).  If that one is the group's own, only its oldest page is evicted.

Evictable large pages, and cached pages inside one large page, are in exact order of age, which is that of release.

A group may be *wide*: its pages are too big for one large page and lie in several, a part in each.  Such a group takes
and gives back ``width`` large pages together, and is booked under the first of them, the *lead*: a page is one entry
in every book, however many parts it has, and its number is that of its part in the lead.  Wherever a step above says
large page, a wide group has a lead with its companions.

Every operation is O(1) per small page asked, amortised; nothing scans the pool.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from operator import add


class PageState(IntEnum):
    """State of a small page."""

    FREE = 0
    LIVE = 1
    CACHED = 2


class PageError(Exception):
    """An operation names a page that is not in the state it assumes; nothing was changed."""


class OutOfPagesError(Exception):
    """The pages asked for are not there; nothing was changed."""


@dataclass(frozen=True)
class GroupUsage:
    """Small pages of one group by state.  The last three add up to ``ratio / width`` times its `large_pages`."""

    large_pages: int
    live: int
    cached: int
    stranded: int
    """Free slots of large pages that hold live or cached pages: only this group can use them."""


@dataclass(frozen=True)
class Usage:
    """State of the pool: `free` + `reserved` + the groups' large pages are all its large pages."""

    large_pages: int
    reserved: int
    free: int
    evictable: int
    """Large pages without live pages (a part of the groups' large pages)."""
    groups: tuple[GroupUsage, ...]


@dataclass(frozen=True)
class Counters:
    """Totals since start."""

    evicted_pages: tuple[int, ...]
    """Cached small pages that lost their contents to another use, by group."""
    evicted_large_pages: int
    whole_page_grants: int
    """Large pages granted whole to one request (step 1)."""
    evicted_by_cause: tuple[tuple[int, ...], ...] = ()
    """Cached small pages that lost their contents, by group and cause (`EVICTION_CAUSES`); all but the forgotten and
    unreachable ones are `evicted_pages`."""


EVICTION_CAUSES = ("large_page", "beside_live", "own_oldest", "forgotten", "unreachable")
"""Why a cached page lost its contents: with its whole large page, for another use; alone, beside live pages or as the
oldest of its group; or because it was told to be forgotten, in general or since no hit could get to it any more."""

CLOCK_HZ = 1 << 20
"""Steps of the allocator's clock per second, where whoever drives it tells the time (`TwoLevelAllocator.tick`)."""

AGE_BUCKETS = 64
"""Bucket ``n`` has the evictions at an age of more than half of ``2**n``, and at most ``2**n``, steps of the clock."""


SCARCE = 32
"""When at most one large page in so many is free, cached pages beside live ones are reused, if they are old enough."""

PRESSED = 8
"""When at most one large page in so many is available, they are reused first: room counts for more than hits."""

EvictCallback = Callable[[int, int], None]
# Plain integers: looking up a member of an enumeration costs as much as the rest of an operation's bookkeeping.
_FREE, _LIVE, _CACHED = int(PageState.FREE), int(PageState.LIVE), int(PageState.CACHED)
_LARGE_PAGE, _BESIDE_LIVE, _OWN_OLDEST, _FORGOTTEN, _UNREACHABLE = range(len(EVICTION_CAUSES))
UNOWNED = -1
"""In `TwoLevelAllocator.map`: a large page on the free list."""
RESERVED = -2
"""In `TwoLevelAllocator.map`: a large page that is never granted."""


class _Group:
    """Bookkeeping of one group; indices of the per-large-page tables are large page numbers."""

    __slots__ = (
        "ages",
        "beside",
        "cached_pages",
        "evicted",
        "live_pages",
        "mask",
        "mixed",
        "mixed_mask",
        "open_slots",
        "owned",
        "partial",
        "ratio",
        "state",
        "width",
    )

    def __init__(self, ratio: int, width: int, large_pages: int, reserved: int) -> None:
        self.ratio = ratio
        self.width = width
        # Of a wide group, by lead: how many small pages further the other parts of its pages lie.
        self.beside = dict.fromkeys(range(reserved), (0,) * (width - 1))
        self.state = bytearray(large_pages * ratio)
        # partial[n]: large pages with n live pages and at least one free slot; bit n of mask: partial[n] is
        # not empty.  So the fullest one is found without a search.
        # OrderedDict, because the first key of a dict that is emptied from its front takes a scan to find.
        self.partial: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ratio + 1)]
        self.mask = 0
        # Partly live large pages with something cached, in the same way.
        self.mixed: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ratio + 1)]
        self.mixed_mask = 0
        self.open_slots = 0  # small pages, free or cached, of partly live large pages
        self.owned = 0  # leads
        self.live_pages = 0
        self.cached_pages = 0
        self.evicted = [0] * len(EVICTION_CAUSES)
        self.ages = [0] * (2 * AGE_BUCKETS)

    def evict(self, cause: int, pages: int, age: int) -> None:
        """Count `pages` pages that were evicted together."""
        self.evicted[cause] += pages
        bucket = (max(age, 1) - 1).bit_length()
        self.ages[bucket] += 1
        self.ages[AGE_BUCKETS + bucket] += age


class TwoLevelAllocator:
    """Grants, keeps and evicts small pages.

    `large_pages` counts all of them, the first `reserved` included, which are never granted (engines use page 0
    as the null page).  ``ratios[g]`` is the number of small pages of group ``g`` in a large page, ``widths[g]`` the
    number of large pages that each of them has a part in (default: 1).  `on_evict(group, page)` is called whenever a
    cached page loses its contents to another use.

    Raises:
        ValueError: no page is left to grant, a ratio or width below 1, or not one width for every ratio.
    """

    def __init__(
        self,
        large_pages: int,
        ratios: Sequence[int],
        *,
        widths: Sequence[int] | None = None,
        reserved: int = 1,
        on_evict: EvictCallback | None = None,
    ) -> None:
        if not ratios or min(ratios) < 1:
            raise ValueError(f"ratios must name at least one group, each at least 1: {list(ratios)}")
        if widths is None:
            widths = [1] * len(ratios)
        if len(widths) != len(ratios) or min(widths) < 1:
            raise ValueError(f"widths must name one for each of the {len(ratios)} groups, at least 1: {list(widths)}")
        if large_pages <= reserved:
            raise ValueError(f"{large_pages} large pages, {reserved} of them reserved: none is left to grant")
        self.large_pages = large_pages
        self.reserved = reserved
        self.ratios = tuple(ratios)
        self._on_evict = on_evict
        self.widths = tuple(widths)
        self._groups = [_Group(r, w, large_pages, reserved) for r, w in zip(ratios, widths, strict=True)]
        self._owner = [RESERVED] * reserved + [UNOWNED] * (large_pages - reserved)
        self._live = [0] * large_pages
        # Per large page: its free slots (a stack) and its cached pages with the time each fell out of use.
        self._slots: list[list[int]] = [[] for _ in range(large_pages)]
        self._cached: list[dict[int, int]] = [{} for _ in range(large_pages)]
        self._free = list(range(large_pages - 1, reserved - 1, -1))
        # Evictable large pages, with the time the last of their pages fell out of use; oldest first.
        self._evictable: OrderedDict[int, int] = OrderedDict()
        self._beside = 0  # companions of the evictable ones
        self._expected = [0] * len(ratios)
        self._clock = 0
        self._evicted_large = 0
        self._whole_grants = 0

    # -- questions ------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Large pages that hold nothing live."""
        return len(self._free) + len(self._evictable) + self._beside

    def parts(self, group: int, pages: Sequence[int]) -> list[list[int]]:
        """Where `pages`, granted or reserved, lie: for each part of them, its small page of the buffer.

        ``parts[i][n]`` is part ``i`` of ``pages[n]``; the first part's numbers are `pages`.
        """
        g = self._groups[group]
        if g.width == 1:
            return [list(pages)]
        if not pages:
            return [[] for _ in range(g.width)]
        if len(pages) == 1:  # most often: a running request's next page
            (page,) = pages
            return [[page], *[[page + distance] for distance in g.beside[page // g.ratio]]]
        further = zip(*[g.beside[page // g.ratio] for page in pages], strict=True)
        return [list(pages), *(list(map(add, pages, distances)) for distances in further)]

    def state(self, group: int, page: int) -> PageState:
        """State of a small page.

        Raises:
            PageError: the group has no such page.
        """
        self._check(group, page)
        return PageState(self._groups[group].state[page])

    def large_pages_needed(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> int:
        """Large pages that granting ``pages[g]`` small pages to every group would take from `available`.

        `pins[g]` are pages, each named once, that the same request will hold through prefix hits; cached ones
        leave the evictable pool first.  The request fits if and only if the answer is at most `available`.

        No side effects.
        """
        needed = 0
        for g, group in enumerate(self._groups):
            ratio = group.ratio
            slots = group.open_slots
            if pins:
                pinned: set[int] = set()
                for page in pins[g]:
                    if group.state[page] == _CACHED:
                        slots -= 1
                        if not self._live[page // ratio]:
                            pinned.add(page // ratio)
                needed += len(pinned) * group.width
                slots += len(pinned) * ratio
            short = pages[g] - slots
            if short > 0:
                needed += -(-short // ratio) * group.width
        return needed

    def fits(self, pages: Sequence[int], pins: Sequence[Iterable[int]] = ()) -> bool:
        """Whether a request for these pages, holding these hits, can be granted now."""
        return self.large_pages_needed(pages, pins) <= self.available

    # -- operations -----------------------------------------------------------------------------------------

    def tick(self, now: int = 0) -> None:
        """Advance the clock: pages released from now on are younger than those before.

        By one step, or to `now` (`CLOCK_HZ` per second) if that is later: then stamps tell ages.
        """
        clock = self._clock + 1
        self._clock = now if now > clock else clock

    def expect(self, pages: Sequence[int]) -> None:
        """Announce what the current request will still ask of each group.

        Until `allocate` has granted that much, no group takes a large page that another one's share needs,
        so a request that fits is granted in full, whatever the order of its calls.  Replaces the last one.

        Raises:
            ValueError: not one number of pages for every group.
        """
        if len(pages) != len(self._groups):
            raise ValueError(f"{len(pages)} expectations for {len(self._groups)} groups")
        self._expected = list(pages)

    def allocate(self, group: int, count: int) -> list[int]:
        """Grant `count` small pages of `group`; they become live.

        Raises:
            OutOfPagesError: they are not there.
            PageError: there is no such group, or `count` is negative.
        """
        if not 0 <= group < len(self._groups) or count < 0:
            raise PageError(f"cannot allocate {count} small pages of group {group} of {len(self._groups)}")
        g = self._groups[group]
        short = count - g.open_slots
        if short > 0 and -(-short // g.ratio) * g.width > self._spare(group):
            raise OutOfPagesError(
                f"group {group} asks for {count} small pages: {g.open_slots} slots are open, and {self._spare(group)} "
                f"large pages of {g.ratio} are available to it ({self.available} less what other groups expect)"
            )
        pages: list[int] = []
        left = count
        if left >= g.ratio:
            # Each takes from the free list what it takes from the spare ones.
            whole = min(left // g.ratio, len(self._free) // g.width, self._spare(group) // g.width)
            for _ in range(whole):
                pages.extend(self._grant_whole(group, g))
            left -= max(0, whole) * g.ratio
        while left > 0:
            shared = self._grant_shared(group, g, left)
            pages.extend(shared)
            left -= len(shared)
        self._expected[group] = max(0, self._expected[group] - count)
        return pages

    def release(self, group: int, page: int, keep: bool) -> None:
        """A live page is no longer needed; `keep` says whether its contents can serve a hit.

        Raises:
            PageError: it is not live (a double free, a page of nobody).
        """
        self.release_run(group, (page,), keep)

    def release_run(self, group: int, pages: Sequence[int], keep: bool) -> None:
        """`release` for each of `pages`, in this order, at the price of little more than one; all in one large page.

        Raises:
            PageError: one of them is not live, named twice or in another large page.
        """
        g, large = self._require_run(group, pages, _LIVE)
        count, now = len(pages), self._clock
        slots, cached = self._slots[large], self._cached[large]
        live = self._live[large]
        left = live - count
        self._live[large] = left
        g.live_pages -= count
        if slots:
            self._unbucket(g, large, live)
        if cached:
            self._unmix(g, large, live)
        state = g.state
        if keep:
            g.cached_pages += count
            for page in pages:
                state[page] = _CACHED
                cached[page] = now
        else:
            for page in pages:
                state[page] = _FREE
            slots.extend(pages)
        if slots:
            self._bucket(g, large, left)
        if left:
            g.open_slots += count
            if cached:
                self._mix(g, large, left)
        else:
            g.open_slots -= g.ratio - live
            if cached:
                self._evictable[large] = now
                self._beside += g.width - 1
            else:
                self._return_large(g, large)

    def revive(self, group: int, page: int) -> None:
        """A cached page is needed again (a prefix hit): it becomes live.

        Raises:
            PageError: it is not cached.
        """
        self.revive_run(group, (page,))

    def revive_run(self, group: int, pages: Sequence[int]) -> None:
        """`revive` for each of `pages`, which all lie in one large page.

        Raises:
            PageError: one of them is not cached, named twice or in another large page.
        """
        g, large = self._require_run(group, pages, _CACHED)
        self._enliven(g, large, pages)

    def forget(self, group: int, page: int, unreachable: bool = False) -> None:
        """A cached page's contents are worthless now: it becomes free.  `on_evict` is not called.

        `unreachable`: because no hit can get to them any more (`jenga.reach`).

        Raises:
            PageError: it is not cached.
        """
        g = self._require(group, page, _CACHED)
        large = page // g.ratio
        live = self._live[large]
        had_slot = bool(self._slots[large])
        g.evicted[_UNREACHABLE if unreachable else _FORGOTTEN] += 1
        self._uncache(g, large, page)
        g.state[page] = _FREE
        self._slots[large].append(page)
        if not live and not self._cached[large]:
            if had_slot:
                self._unbucket(g, large, 0)
            del self._evictable[large]
            self._beside -= g.width - 1
            self._return_large(g, large)
        elif not had_slot:
            self._bucket(g, large, live)

    # -- reports --------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Pages by state, O(groups)."""
        return Usage(
            large_pages=self.large_pages,
            reserved=self.reserved,
            free=len(self._free),
            evictable=len(self._evictable) + self._beside,
            groups=tuple(
                GroupUsage(
                    large_pages=g.owned * g.width,
                    live=g.live_pages,
                    cached=g.cached_pages,
                    stranded=g.owned * g.ratio - g.live_pages - g.cached_pages,
                )
                for g in self._groups
            ),
        )

    def counters(self) -> Counters:
        """Totals since start."""
        return Counters(
            evicted_pages=tuple(sum(g.evicted[:_FORGOTTEN]) for g in self._groups),
            evicted_large_pages=self._evicted_large,
            whole_page_grants=self._whole_grants,
            evicted_by_cause=tuple(tuple(g.evicted) for g in self._groups),
        )

    def eviction_ages(self, group: int) -> tuple[list[int], list[int]]:
        """Evictions of a group by age: their numbers by bucket (`AGE_BUCKETS`), and the sums of their ages (steps)."""
        ages = self._groups[group].ages
        return ages[:AGE_BUCKETS], ages[AGE_BUCKETS:]

    def owner(self, large: int) -> int | None:
        """Group that owns a large page, None if it is free or reserved."""
        return None if self._owner[large] < 0 else self._owner[large]

    def lead(self, large: int) -> int:
        """The large page under which one is booked: of a wide group the lead, else itself.  O(leads)."""
        if self._owner[large] < 0:
            return large
        g = self._groups[self._owner[large]]
        return next((lead for lead in g.beside if large in self._companions(g, lead)), large)

    @property
    def clock(self) -> int:
        """The logical clock that `tick` advances."""
        return self._clock

    def map(self) -> tuple[bytes, tuple[bytes, ...]]:
        """Copies of the whole books, for `jenga.metrics.map`: milliseconds for 100,000 large pages.

        The owner of each large page, a signed byte (its group, `UNOWNED` or `RESERVED`), and by group the state of
        each small page.
        """
        states = []
        for g in self._groups:
            state, ratio = bytearray(g.state), g.ratio
            for lead in g.beside:
                for large in self._companions(g, lead):
                    state[large * ratio : (large + 1) * ratio] = g.state[lead * ratio : (lead + 1) * ratio]
            states.append(bytes(state))
        return array("b", self._owner).tobytes(), tuple(states)

    def released(self, large: int) -> dict[int, int]:
        """The cached small pages of a large page (of a wide group: a lead), with the clock when each was released."""
        return dict(self._cached[large])

    def check(self) -> None:
        """Recount everything from the page states and compare (debugging: O(pages)).

        Raises:
            AssertionError: the books do not balance; the message says which.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a large page is twice in the free list"
        for index, g in enumerate(self._groups):
            owned = {p for p, o in enumerate(self._owner) if o == index}
            leads = owned & (g.beside.keys() if g.width > 1 else owned)
            others = [p for lead in leads for p in self._companions(g, lead)]
            assert len(leads) == g.owned, f"group {index}: {g.owned} leads booked, {len(leads)} owned"
            assert sorted([*leads, *others]) == sorted(owned), f"group {index}: companions are wrong"
            totals = [0, 0, 0]
            open_slots = 0
            for large in range(self.large_pages):
                states = g.state[large * g.ratio : (large + 1) * g.ratio]
                if large not in leads:
                    assert not any(states), f"group {index} has pages in large page {large} of {self._owner[large]}"
                    continue
                live, cached = states.count(PageState.LIVE), states.count(PageState.CACHED)
                totals[1] += live
                totals[2] += cached
                assert live + cached > 0, f"large page {large} is empty but owned by group {index}"
                assert large not in free, f"large page {large} is owned and free"
                assert live == self._live[large], f"large page {large}: live {self._live[large]}, counted {live}"
                assert cached == len(self._cached[large]), f"large page {large}: cached pages differ"
                slots = self._slots[large]
                assert len(set(slots)) == len(slots) == g.ratio - live - cached, f"large page {large}: slots differ"
                assert all(g.state[s] == PageState.FREE for s in slots), f"large page {large}: slot not free"
                assert (large in self._evictable) == (live == 0), f"large page {large}: evictable is wrong"
                mixed = [n for n, bucket in enumerate(g.mixed) if large in bucket]
                assert mixed == ([live] if live and cached else []), f"large page {large}: mixed in buckets {mixed}"
                buckets = [n for n, bucket in enumerate(g.partial) if large in bucket]
                assert buckets == ([live] if slots else []), f"large page {large}: in buckets {buckets}"
                if live:
                    open_slots += g.ratio - live
            assert totals[1:] == [g.live_pages, g.cached_pages], f"group {index}: totals differ"
            assert open_slots == g.open_slots, f"group {index}: open slots {g.open_slots}, counted {open_slots}"
            assert g.mask == sum(1 << n for n, bucket in enumerate(g.partial) if bucket), f"group {index}: mask"
            assert g.mixed_mask == sum(1 << n for n, b in enumerate(g.mixed) if b), f"group {index}: mixed mask"
        owned_total = sum(g.owned * g.width for g in self._groups)
        beside = sum(self._groups[self._owner[large]].width - 1 for large in self._evictable)
        assert self._beside == beside, f"evictable: {self._beside} companions booked, {beside} there"
        assert owned_total + len(free) + self.reserved == self.large_pages, "large pages lost or doubled"
        stamps = list(self._evictable.values())
        assert stamps == sorted(stamps), "evictable large pages are out of order"

    # -- internals ------------------------------------------------------------------------------------------

    def _check(self, group: int, page: int) -> None:
        if not 0 <= group < len(self._groups):
            raise PageError(f"there is no group {group}; groups are 0 to {len(self._groups) - 1}")
        if not 0 <= page < len(self._groups[group].state):
            raise PageError(f"group {group} has no small page {page}; it has {len(self._groups[group].state)}")

    def _require(self, group: int, page: int, wanted: int) -> _Group:
        """The group, if it has such a page in state `wanted`."""
        if 0 <= group < len(self._groups):
            g = self._groups[group]
            if 0 <= page < len(g.state) and g.state[page] == wanted:
                return g
        found = self.state(group, page)
        raise PageError(
            f"small page {page} of group {group} is {found.name.lower()}, not {PageState(wanted).name.lower()}"
        )

    def _require_run(self, group: int, pages: Sequence[int], wanted: int) -> tuple[_Group, int]:
        """The group and the large page, if `pages` are different pages of one large page in state `wanted`."""
        g = self._require(group, pages[0], wanted)
        large = pages[0] // g.ratio
        if len(pages) > 1:
            for page in pages:
                if page // g.ratio != large:
                    raise PageError(f"small page {page} of group {group} is not in large page {large}, as the first is")
                if g.state[page] != wanted:
                    self._require(group, page, wanted)
            if len(set(pages)) != len(pages):
                raise PageError(f"a small page of group {group} is named twice: {sorted(pages)}")
        return g, large

    def _spare(self, group: int) -> int:
        """Large pages that `group` may take and still leave the others what they expect."""
        spare = self.available
        for h, expected in enumerate(self._expected):
            if expected and h != group:
                short = expected - self._groups[h].open_slots
                if short > 0:
                    spare -= -(-short // self._groups[h].ratio) * self._groups[h].width
        return spare

    def _bucket(self, g: _Group, large: int, live: int) -> None:
        g.partial[live][large] = None
        g.mask |= 1 << live

    def _unbucket(self, g: _Group, large: int, live: int) -> None:
        bucket = g.partial[live]
        del bucket[large]
        if not bucket:
            g.mask &= ~(1 << live)

    def _uncache(self, g: _Group, large: int, page: int) -> None:
        cached = self._cached[large]
        del cached[page]
        g.cached_pages -= 1
        if not cached and self._live[large]:
            self._unmix(g, large, self._live[large])

    def _enliven(self, g: _Group, large: int, pages: Sequence[int]) -> None:
        """Cached pages of one large page become live."""
        cached, state, count = self._cached[large], g.state, len(pages)
        for page in pages:
            del cached[page]
            state[page] = _LIVE
        g.cached_pages -= count
        g.live_pages += count
        live = self._live[large]
        now = self._live[large] = live + count
        if self._slots[large]:
            self._unbucket(g, large, live)
            self._bucket(g, large, now)
        if live:
            g.open_slots -= count
            self._unmix(g, large, live)
            if cached:
                self._mix(g, large, now)
        else:
            self._leave_evictable(g, large)
            g.open_slots += g.ratio - count

    def _leave_evictable(self, g: _Group, large: int) -> None:
        """A large page without live pages gets one."""
        if self._evictable.pop(large, None) is not None:
            self._beside -= g.width - 1
            if self._cached[large]:
                self._mix(g, large, self._live[large])

    def _return_large(self, g: _Group, large: int) -> None:
        """An owned large page without live or cached pages goes back to the free list."""
        if self._slots[large]:
            g.partial[0].pop(large, None)
            if not g.partial[0]:
                g.mask &= ~1
        self._slots[large] = []
        self._owner[large] = UNOWNED
        g.owned -= 1
        self._free.append(large)
        if g.width > 1:
            others = self._companions(g, large)
            del g.beside[large]
            for other in others:
                self._owner[other] = UNOWNED
            self._free += others

    def _evict_large(self, large: int) -> None:
        """Empty an evictable large page and put it on the free list."""
        index = self._owner[large]
        g = self._groups[index]
        cached = self._cached[large]
        for page in cached:
            g.state[page] = _FREE
            if self._on_evict is not None:
                self._on_evict(index, page)
        g.cached_pages -= len(cached)
        g.evict(_LARGE_PAGE, len(cached), self._clock - self._evictable.pop(large))
        self._cached[large] = {}
        self._beside -= g.width - 1
        self._evicted_large += g.width
        self._return_large(g, large)

    @staticmethod
    def _companions(g: _Group, lead: int) -> list[int]:
        return [lead + distance // g.ratio for distance in g.beside.get(lead, ())]

    def _own(self, index: int, g: _Group) -> int:
        large = self._free.pop()
        self._owner[large] = index
        g.owned += 1
        if g.width > 1:
            others = [self._free.pop() for _ in range(g.width - 1)]
            for other in others:
                self._owner[other] = index
            g.beside[large] = tuple([(other - large) * g.ratio for other in others])
        return large

    def _grant_whole(self, index: int, g: _Group) -> range:
        large = self._own(index, g)
        pages = range(large * g.ratio, (large + 1) * g.ratio)
        g.state[pages.start : pages.stop] = bytes([_LIVE]) * g.ratio
        g.live_pages += g.ratio
        self._live[large] = g.ratio
        self._whole_grants += g.width
        return pages

    def _grant_shared(self, index: int, g: _Group, count: int) -> list[int]:
        """Up to `count` small pages of one large page: steps 2 to 6, which would all go on in the page they began.

        Nothing where a large page was evicted, but a wide group needs more.
        """
        partly_live = g.mask & ~1
        if partly_live:
            fuller = g.mixed_mask.bit_length() > partly_live.bit_length()
            if fuller and self.available * SCARCE <= self.large_pages:
                return self._reuse_cached(index, g, next(iter(g.mixed[g.mixed_mask.bit_length() - 1])), count)
            fullest = g.partial[partly_live.bit_length() - 1]
            return self._take_slots(g, next(iter(fullest)), count)
        spare, free = self._spare(index), len(self._free)
        fullest_mixed = next(iter(g.mixed[g.mixed_mask.bit_length() - 1])) if g.mixed_mask else None
        if fullest_mixed is not None and (min(spare, free) < g.width or free * SCARCE <= self.large_pages):
            pressed = spare < g.width or self.available * PRESSED <= self.large_pages or not self._evictable
            old = count if pressed else self._as_old(fullest_mixed, next(iter(self._evictable.values())), count)
            if old:
                return self._reuse_cached(index, g, fullest_mixed, old)
        assert spare >= g.width, "allocate has counted the open slots"
        if free >= g.width:
            if g.mixed_mask and (self.available - g.width) * SCARCE <= self.large_pages:
                count = 1  # this makes large pages so few that step 2 has another answer
            return self._take_slots(g, self._carve(index, g), count)
        if g.mask:  # a free slot in an evictable page of the group: nothing need be evicted
            return self._take_slots(g, next(iter(g.partial[0])), count)
        oldest = next(iter(self._evictable))
        if self._owner[oldest] == index:  # its other pages can stay cached
            return self._reuse_cached(index, g, oldest, count)
        self._evict_large(oldest)
        return self._take_slots(g, self._carve(index, g), count) if len(self._free) >= g.width else []

    def _as_old(self, large: int, stamp: int, most: int) -> int:
        """How many cached pages of a large page, `most` at most, are as old as `stamp` or older."""
        found = 0
        for each in islice(self._cached[large].values(), most):
            if each > stamp:
                break
            found += 1
        return found

    def _carve(self, index: int, g: _Group) -> int:
        large = self._own(index, g)
        first = large * g.ratio
        self._slots[large] = list(range(first + g.ratio - 1, first - 1, -1))
        self._bucket(g, large, 0)
        return large

    def _take_slots(self, g: _Group, large: int, count: int) -> list[int]:
        """Grant up to `count` of the free slots of an owned large page."""
        slots = self._slots[large]
        live = self._live[large]
        self._unbucket(g, large, live)
        pages = slots[: -count - 1 : -1]
        del slots[-count:]
        for page in pages:
            g.state[page] = _LIVE
        now = live + len(pages)
        g.live_pages += len(pages)
        self._live[large] = now
        if live:
            g.open_slots -= len(pages)
            if self._cached[large]:
                self._unmix(g, large, live)
                self._mix(g, large, now)
        else:
            self._leave_evictable(g, large)
            g.open_slots += g.ratio - now
        if slots:
            self._bucket(g, large, now)
        return pages

    def _mix(self, g: _Group, large: int, live: int) -> None:
        g.mixed[live][large] = None
        g.mixed_mask |= 1 << live

    def _unmix(self, g: _Group, large: int, live: int) -> None:
        bucket = g.mixed[live]
        del bucket[large]
        if not bucket:
            g.mixed_mask &= ~(1 << live)

    def _reuse_cached(self, index: int, g: _Group, large: int, count: int) -> list[int]:
        """Evict up to `count` cached pages of an owned large page, the oldest first, and grant their places."""
        cause = _BESIDE_LIVE if self._live[large] else _OWN_OLDEST
        pages = []
        for page, stamp in islice(self._cached[large].items(), count):
            g.evict(cause, 1, self._clock - stamp)
            if self._on_evict is not None:
                self._on_evict(index, page)
            pages.append(page)
            cause = _BESIDE_LIVE
        self._enliven(g, large, pages)
        return pages
