"""Prefix caching over a pool of small pages: which request holds which page, and what else can use its contents.

A request's tokens are known here only by *keys*: ``keys[g][i]`` names the contents of page ``i`` of group ``g``
together with everything before it, so equal keys mean an equal prefix.  A page under its key in the group's index
can serve a hit, whether some request still holds it (live) or none does (cached, evictable).

What is worth keeping is decided once, when a request is admitted: the *boundaries* where a later request is likely to
resume, which are the end of its prompt and the end of what it shares with earlier ones (`Hit.furthest`).  Layer types
that need everything (full attention) keep everything; windows and states are kept only where a hit at a boundary
needs them, so the rest of a long prompt's windows does not push other prompts out of the cache.

Not safe for use by several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Protocol

from jenga.allocator import EvictCallback, OutOfPagesError, Usage
from jenga.checkpoints import PASS_TOKENS, Boundaries, boundaries, kept_pages
from jenga.hits import GroupCache, Hit, longest_common_hit
from jenga.layers import Counts
from jenga.metrics import LiveUse
from jenga.policies import CachedTest, LayerPolicy
from jenga.reach import Reach, page_before

Keys = Sequence[Sequence[int]]
"""``keys[g][i]``: contents of page ``i`` of group ``g`` and of all before it; complete pages only."""


class CachedGroup(Protocol):
    """What the cache must know of a layer group (`jenga.layout.LayerGroup` is one)."""

    @property
    def policy(self) -> LayerPolicy: ...
    @property
    def page_tokens(self) -> int: ...


class PagePool(Protocol):
    """Where pages come from (`jenga.allocator.TwoLevelAllocator` is one)."""

    @property
    def available(self) -> int: ...
    def tick(self) -> None: ...
    def expect(self, pages: Sequence[int]) -> None: ...
    def allocate(self, group: int, count: int) -> list[int]: ...
    def release(self, group: int, page: int, keep: bool) -> None: ...
    def revive(self, group: int, page: int) -> None: ...
    def forget(self, group: int, page: int) -> None: ...
    def fits(self, pages: Sequence[int], pins: Sequence[list[int]] = ()) -> bool: ...
    def usage(self) -> Usage: ...


class RequestError(Exception):
    """A request is not in the state that the operation assumes; nothing was changed."""


class UnknownRequestError(RequestError):
    """No such request holds pages (never admitted, or released already)."""


@dataclass(frozen=True)
class Match:
    """What a prompt finds in the cache."""

    hit: Hit
    pages: tuple[dict[int, int], ...]
    """Per group, the pages that a request resuming there must hold: index in the sequence -> small page."""


_FAR = 1 << 40  # tokens; longer than any sequence


@dataclass(frozen=True)
class Table:
    """What a request holds in one group."""

    reading: int
    """First token that the step under way computes: what it reads is needed until `PrefixCache.end_step`."""
    computed: int
    """Tokens whose memory is written, when that step is done."""
    image_tokens: int
    pages: Mapping[int, int]
    """Index in the sequence -> small page."""


class _Sequence:
    """One request's block tables."""

    __slots__ = (
        "boundaries",
        "computed",
        "dropped",
        "ends",
        "image_tokens",
        "keep",
        "keys",
        "pages",
        "pauses",
        "reading",
    )

    def __init__(self, keys: Keys, computed: int, match: Match, ends: list[int], image_tokens: int) -> None:
        self.keys = keys
        self.image_tokens = image_tokens
        self.computed = computed
        self.reading = computed  # the first token that the step under way computes
        self.pages = [dict(held) for held in match.pages]
        self.ends = ends  # per group, the first page index not allocated yet
        self.dropped = [0] * len(ends)  # per group, pages before this index have been dropped
        self.boundaries: tuple[int, ...] = ()
        self.pauses: tuple[int, ...] = ()  # those at which computing pauses for a state's sake
        self.keep: list[list[range]] = []  # per group, the pages that hits at the boundaries need


class PrefixCache:
    """Block tables, reference counts and the prefix index of all groups.

    `pool` is called with the eviction callback and returns the pool to use.  `groups` in the pool's order;
    `counts` says which tokens each stores something for (text, if left out).  Images are taken to be nobody
    else's and to come first, so a request with images finds nothing in the cache and leaves nothing there.
    `free_unreachable`: a cached page is freed as soon as no hit can get to it (`jenga.reach`), instead of waiting for
    its turn to be evicted.  `pass_tokens`: what one more forward pass costs, in tokens (`jenga.checkpoints`).
    """

    def __init__(
        self,
        groups: Sequence[CachedGroup],
        pool: Callable[[EvictCallback], PagePool],
        counts: Sequence[Counts] | None = None,
        free_unreachable: bool = False,
        pass_tokens: int = PASS_TOKENS,
    ) -> None:
        self.groups = tuple(groups)
        self.counts = tuple(counts or [Counts.TEXT] * len(self.groups))
        self._text = [g for g, kind in enumerate(self.counts) if kind is not Counts.IMAGES]
        self.alignment = lcm(*(self.groups[g].page_tokens for g in self._text))
        """Granularity of hits, in tokens."""
        self._pass_tokens = pass_tokens
        self.pool = pool(self._unindex)
        self._sequences: dict[Hashable, _Sequence] = {}
        self._index: list[dict[int, int]] = [{} for _ in groups]
        self._key: list[dict[int, int]] = [{} for _ in groups]  # the index, turned round
        self._refs: list[dict[int, int]] = [{} for _ in groups]
        self._dense = [g.policy.resident_from(_FAR, g.page_tokens) == 0 for g in groups]  # need every page
        # They bound a hit most tightly: ask them first.
        self._lookup_order = sorted(self._text, key=lambda g: not self._dense[g])
        # Not shared: scratch memory, images, and token budgets (as a sequence grows, others' pages become useless).
        self.shared = tuple(
            g in self._text and group.policy.reusable(0, _FAR, group.page_tokens) for g, group in enumerate(self.groups)
        )
        """Per group, whether its pages can serve hits; the others' keys are never looked at."""
        self._capped = [
            not self.shared[g] and self.counts[g] is not Counts.IMAGES and group.policy.token_pages
            for g, group in enumerate(self.groups)
        ]
        self._states = any(self.shared[g] and not group.policy.token_pages for g, group in enumerate(self.groups))
        self._chain = [(g, group.page_tokens) for g, group in enumerate(groups) if self._dense[g] and self.shared[g]]
        # A page's node is its key times the number of groups, plus its group: one integer is cheaper than a pair.
        self._reach: Reach[int] | None = Reach() if free_unreachable and self._chain else None
        # By key, further pages of what the index has, which requests hold.  When that is evicted one of them takes its
        # place: so all of the prefix before a page that is held stays in the index.
        self._copies: list[dict[int, list[int]]] = [{} for _ in groups]
        self._grown: list[Hashable] = []  # since the last `end_step`
        self.releases = 0
        """Pages given back to the pool since start: what did not fit may fit when this has changed."""

    # -- questions ------------------------------------------------------------------------------------------

    def __contains__(self, request: Hashable) -> bool:
        return request in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def computed(self, request: Hashable) -> int:
        """Tokens of `request` whose memory is written.

        Raises:
            UnknownRequestError: it holds no pages.
        """
        return self._require(request).computed

    def pages(self, request: Hashable, group: int) -> dict[int, int]:
        """Pages that `request` holds in `group`: index in the sequence -> small page.

        Raises:
            UnknownRequestError: it holds no pages.
        """
        return dict(self._require(request).pages[group])

    def tables(self, group: int) -> Iterator[Table]:
        """The block tables of all requests in `group`."""
        for sequence in self._sequences.values():
            yield Table(sequence.reading, sequence.computed, sequence.image_tokens, sequence.pages[group])

    def lookup(self, keys: Keys, limit_tokens: int) -> Match:
        """The longest prefix of at most `limit_tokens` tokens that can be resumed.  No side effects."""
        hit = self.hit(keys, limit_tokens)
        pages: list[dict[int, int]] = []
        for g, group in enumerate(self.groups):
            if not self.shared[g]:
                pages.append({})
                continue
            needed = group.policy.pages_of_hit(hit.tokens // group.page_tokens, group.page_tokens)
            index, own = self._index[g], keys[g]
            pages.append({i: index[own[i]] for i in needed})
        return Match(hit, tuple(pages))

    def hit(
        self,
        keys: Keys,
        limit_tokens: int,
        dense_only: bool = False,
        coming: Sequence[Container[int]] | None = None,
    ) -> Hit:
        """The hit of `lookup` without its pages.

        `dense_only` asks only the groups that need every page.  Pages that are in `coming` (by group, the keys) count
        as if they were cached.
        """
        groups = [g for g in self._lookup_order if self._dense[g]] if dense_only else self._lookup_order
        caches = [
            GroupCache(
                self.groups[g].policy,
                self.groups[g].page_tokens,
                _cached_test(self._index[g], keys[g], coming[g] if coming else ())
                if self.shared[g]
                else _nothing_cached,
            )
            for g in groups
        ]
        return longest_common_hit(caches, limit_tokens, None if dense_only else self.alignment)

    def leaves(self, keys: Keys, hit: Hit, prompt_tokens: int) -> list[list[int]]:
        """By group, the keys of the pages that a prompt leaves for others where it resumes behind `hit`."""
        kept = boundaries(hit, prompt_tokens, self.alignment, pass_tokens=self._pass_tokens)
        return [
            [keys[g][i] for pages in self._kept(g, kept, prompt_tokens, hit.tokens) for i in pages]
            for g in range(len(self.groups))
        ]

    def no_match(self) -> Match:
        """The match of a request that finds nothing."""
        return Match(Hit(0, 0, None), tuple({} for _ in self.groups))

    def needs(self, match: Match, tokens: int, chunk: int, image_tokens: int = 0) -> list[int]:
        """New small pages per group to compute a sequence of `tokens` tokens from `match` on, at its peak.

        `chunk` is the most tokens computed at once: windows slide only between chunks.
        """
        needs = []
        for g, (group, held) in enumerate(zip(self.groups, match.pages, strict=True)):
            size = group.page_tokens
            if not group.policy.token_pages:
                needs.append(1)
                continue
            # The last chunk may start anywhere in a page.
            start = max(match.hit.tokens, tokens - chunk - size + 1)
            first = self._resident(g, start)
            kept = sum(1 for i in held if i >= first) if first else len(held)
            needs.append(self._end(g, tokens, image_tokens) - first - kept)
        return needs

    def fits(self, match: Match, tokens: int, chunk: int, image_tokens: int = 0, growth: int = 0) -> bool:
        """Whether a sequence of `tokens` tokens has room now, with the pages of `match` held.

        `growth` is the number of pages to leave over in every group that grows with the text, for running requests.
        Exact for the first chunk.  Windows that slide may leave large pages partly used, so a later chunk can still
        find no page although nothing else was admitted.
        """
        pins = [list(held.values()) for held in match.pages]
        needs = self.needs(match, tokens, chunk, image_tokens)
        for g in self._text:
            if self.groups[g].policy.token_pages:
                needs[g] += growth
        return self.pool.fits(needs, pins)

    def room(self, request: Hashable) -> int:
        """Length in tokens up to which `request` can grow in the pages it holds.

        Raises:
            UnknownRequestError: it holds no pages.
        """
        sequence = self._require(request)
        room = _FAR
        for g, group in enumerate(self.groups):
            if group.policy.token_pages:
                room = min(room, self._room(g, sequence))
            elif self._running_state(g, sequence) is None:  # what it holds must stay as it is
                room = sequence.computed
        return room

    def next_stop(self, request: Hashable, tokens: int) -> int:
        """`tokens`, or the earlier length at which computing must pause so that a state can be kept there.

        Raises:
            UnknownRequestError: it holds no pages.
        """
        sequence = self._require(request)
        if not self._states:
            return tokens
        return min((b for b in sequence.pauses if sequence.computed < b < tokens), default=tokens)

    def live_use(self) -> Iterator[LiveUse]:
        """Pages that are held, but neither needed by the step under way nor later, or not full.

        Those not named are both.
        """
        for sequence in self._sequences.values():
            for g, group in enumerate(self.groups):
                first = self._resident(g, sequence.reading)
                stale = 0
                if first > sequence.dropped[g]:
                    refs = self._refs[g]
                    stale = sum(1 for i, page in sequence.pages[g].items() if i < first and refs[page] == 1)
                empty = 0
                if group.policy.token_pages:
                    stored = self.counts[g].length(sequence.computed, sequence.image_tokens)
                    empty = max(0, sequence.ends[g] * group.page_tokens - stored)
                partial = -(-empty // group.page_tokens)
                if stale or partial:
                    yield LiveUse(g, stale + partial, partial, empty)

    # -- operations -----------------------------------------------------------------------------------------

    def admit(self, request: Hashable, keys: Keys, match: Match, prompt_tokens: int, image_tokens: int = 0) -> None:
        """Start `request`: hold the pages of `match`, and choose what to keep of a prompt of `prompt_tokens` tokens.

        Raises:
            RequestError: it is admitted already, or `match` is outdated.
        """
        if request in self._sequences:
            raise RequestError(f"request {request!r} is admitted already: release it first")
        for g, held in enumerate(match.pages):
            for i, page in held.items():
                if self._key[g].get(page) != keys[g][i]:
                    raise RequestError(f"request {request!r}: page {page} of group {g} is gone, look up again")
        start = match.hit.tokens
        ends = [0 if g not in self._text else start // group.page_tokens for g, group in enumerate(self.groups)]
        sequence = _Sequence(keys, start, match, ends, image_tokens)
        for g, held in enumerate(match.pages):
            refs = self._refs[g]
            for page in held.values():
                count = refs.get(page, 0)
                if not count:
                    self.pool.revive(g, page)
                refs[page] = count + 1
        if not image_tokens:
            kept = boundaries(match.hit, prompt_tokens, self.alignment, pass_tokens=self._pass_tokens)
            sequence.boundaries, sequence.pauses = kept.lengths, kept.pauses
            sequence.keep = [self._kept(g, kept, prompt_tokens, start) for g in range(len(self.groups))]
        self._sequences[request] = sequence

    def refresh(self, keys: Keys, limit_tokens: int) -> None:
        """A request with these keys waits: what it will find counts as used now, and is evicted after all else.

        `limit_tokens` is the most that it may find.
        """
        idle = [
            (-(i + 1) * self.groups[g].page_tokens, g, page)
            for g, pages in enumerate(self.lookup(keys, limit_tokens).pages)
            for i, page in pages.items()
            if page not in self._refs[g]
        ]
        for _, g, page in idle:
            self.pool.revive(g, page)
        for _, g, page in sorted(idle):  # the tail first, as in `release`
            self.pool.tick()
            self.pool.release(g, page, True)

    def grow(self, request: Hashable, tokens: int) -> None:
        """Compute `request` up to a length of `tokens` tokens: add the pages for that and index what is complete.

        Raises:
            UnknownRequestError: it holds no pages.
            RequestError: it is that long already.
            OutOfPagesError: the pages are not there; nothing was changed.
        """
        sequence = self._require(request)
        if tokens <= sequence.computed:
            raise RequestError(
                f"request {request!r} has {sequence.computed} tokens already: it cannot grow to {tokens}"
            )
        new = [self._new_pages(g, sequence, tokens) for g in range(len(self.groups))]
        counts = [len(indices) for indices in new]
        if any(counts):
            if not self.pool.fits(counts) and not self._give_up_checkpoints(sequence, new, counts):
                raise OutOfPagesError(
                    f"request {request!r} needs {counts} more pages for {tokens} tokens, "
                    f"{self.pool.available} large pages are available"
                )
            self.pool.expect(counts)
            for g, indices in enumerate(new):
                if indices:
                    pages = self._allocate(g, indices, tokens)
                    sequence.pages[g].update(zip(indices, pages, strict=True))
                    refs = self._refs[g]
                    for page in pages:
                        refs[page] = 1
        self._write(sequence, tokens)
        self._grown.append(request)

    def end_step(self) -> None:
        """The tokens of the latest `grow` calls are computed: drop what their requests no longer need.

        Not earlier: the kernels of a step still read the windows and states that it leaves behind.
        """
        for request in self._grown:
            sequence = self._sequences.get(request)
            if sequence is not None:
                sequence.reading = sequence.computed
                for g in range(len(self.groups)):
                    self._drop(g, sequence)
        self._grown.clear()

    def advance(self, request: Hashable, tokens: int) -> None:
        """Like `grow`, within the pages held (see `room`); windows are not moved.

        Raises:
            UnknownRequestError: it holds no pages.
            RequestError: `tokens` is beyond its room, or behind what it has computed.
        """
        sequence = self._require(request)
        if not sequence.computed <= tokens <= self.room(request):
            raise RequestError(
                f"request {request!r} cannot advance from {sequence.computed} to {tokens} tokens: "
                f"its pages end at {self.room(request)}"
            )
        self._write(sequence, tokens)
        sequence.reading = tokens

    def release(self, request: Hashable) -> None:
        """`request` has ended or is preempted: give its pages back; what is indexed stays cached.

        The tail goes first, in all groups at once: eviction then shortens the prefix evenly.

        Raises:
            UnknownRequestError: it holds no pages.
        """
        sequence = self._require(request)
        self._keep_end(sequence)
        self._remove_copies(sequence)
        del self._sequences[request]
        held = [
            (-(i + 1) * self.groups[g].page_tokens, g, page)
            for g, pages in enumerate(sequence.pages)
            for i, page in pages.items()
        ]
        held.sort()
        for _, g, page in held:
            self._unhold(g, page)

    def snapshot_index(self) -> tuple[dict[int, int], ...]:
        """Per group, a copy of the index: key -> page (debugging)."""
        return tuple(dict(index) for index in self._index)

    # -- internals ------------------------------------------------------------------------------------------

    def _require(self, request: Hashable) -> _Sequence:
        try:
            return self._sequences[request]
        except KeyError:
            raise UnknownRequestError(f"request {request!r} holds no pages: never admitted, or released") from None

    def _resident(self, g: int, tokens: int) -> int:
        group = self.groups[g]
        return group.policy.resident_from(tokens, group.page_tokens)

    def _kept(self, g: int, kept: Boundaries, prompt_tokens: int, after: int) -> list[range]:
        """Pages of group `g` that a prompt leaves for others."""
        group = self.groups[g]
        return kept_pages(group.policy, group.page_tokens, kept, prompt_tokens, after) if self.shared[g] else []

    def _end(self, g: int, tokens: int, image_tokens: int) -> int:
        """Pages of a sequence that attention group `g` stores anything for, dropped ones included."""
        group = self.groups[g]
        end = -(-self.counts[g].length(tokens, image_tokens) // group.page_tokens)
        return end if not self._capped[g] else group.policy.pages_needed(end * group.page_tokens, group.page_tokens)

    def _room(self, g: int, sequence: _Sequence) -> int:
        """Tokens up to which a sequence can grow in its pages of attention group `g`."""
        end = sequence.ends[g]
        if self.counts[g] is Counts.IMAGES or self._end(g, _FAR, 0) == end:
            return _FAR
        return end * self.groups[g].page_tokens - self.counts[g].length(0, sequence.image_tokens)

    def _new_pages(self, g: int, sequence: _Sequence, tokens: int) -> Sequence[int]:
        """Indices of the pages to allocate."""
        size = self.groups[g].page_tokens
        if self.groups[g].policy.token_pages:
            return range(sequence.ends[g], self._end(g, tokens, sequence.image_tokens))
        return () if self._running_state(g, sequence) is not None else ((tokens - 1) // size,)

    def _allocate(self, g: int, indices: Sequence[int], tokens: int) -> list[int]:
        """Pages for `indices` of a sequence that grows to `tokens` tokens.

        Of a window that slides over a long chunk nearly all pages are dropped after the step, and whole large pages
        come back whole.  What stays is asked page by page, so that it fills slots beside others' pages: a large page
        of its own would be left nearly empty.
        """
        first = self._resident(g, tokens)
        passing = sum(1 for i in indices if i < first)
        if not passing:
            pages = self.pool.allocate(g, len(indices))
        else:
            staying = [page for _ in range(len(indices) - passing) for page in self.pool.allocate(g, 1)]
            pages = self.pool.allocate(g, passing) + staying
        if self._reach is not None:
            self._reach.sweep(self._drop_unreachable)  # not while the pool evicts: it would find its books changed
        return pages

    def _give_up_checkpoints(self, sequence: _Sequence, new: list[Sequence[int]], counts: list[int]) -> bool:
        """If that makes room, let states move on in their pages although hits could use what those hold now.

        So a state kept for later requests never costs a running one its place.
        """
        own: dict[int, int] = {}
        for g, indices in enumerate(new):
            if indices and not self.groups[g].policy.token_pages:
                own.update((g, page) for page in sequence.pages[g].values() if self._refs[g][page] == 1)
        fewer = [0 if g in own else count for g, count in enumerate(counts)]
        if not own or not self.pool.fits(fewer):
            return False
        for g, page in own.items():
            self._unindex(g, page)
            new[g] = ()
        counts[:] = fewer
        return True

    def _running_state(self, g: int, sequence: _Sequence) -> int | None:
        """Index under which a state is held that may be overwritten: one that no hit can use."""
        return next((i for i, page in sequence.pages[g].items() if page not in self._key[g]), None)

    def _drop(self, g: int, sequence: _Sequence) -> None:
        first = self._resident(g, sequence.computed)
        start = sequence.dropped[g]
        if first <= start:
            return
        sequence.dropped[g] = first
        held = sequence.pages[g]
        indices = [i for i in held if i < first] if len(held) < first - start else range(start, first)
        for i in indices:
            page = held.pop(i, None)
            if page is not None:
                self._unhold(g, page)

    def _unhold(self, g: int, page: int) -> None:
        refs = self._refs[g]
        count = refs[page]
        if count > 1:
            refs[page] = count - 1
            return
        del refs[page]
        self.releases += 1
        self.pool.tick()
        self.pool.release(g, page, page in self._key[g])

    def _write(self, sequence: _Sequence, tokens: int) -> None:
        """Tokens up to `tokens` are computed: index the pages completed by that which are worth keeping."""
        before, sequence.computed = sequence.computed, tokens
        for g, group in enumerate(self.groups):
            size = group.page_tokens
            if not group.policy.token_pages:
                running = self._running_state(g, sequence)
                held = sequence.pages[g]
                if running is not None:
                    held[(tokens - 1) // size] = held.pop(running)
                if self.shared[g] and tokens in sequence.boundaries:
                    self._index_pages(g, sequence, range(tokens // size - 1, tokens // size))
                continue
            sequence.ends[g] = max(sequence.ends[g], self._end(g, tokens, sequence.image_tokens))
            first, last = before // size, tokens // size
            if sequence.image_tokens or not self.shared[g]:
                continue
            if self._dense[g]:
                self._index_pages(g, sequence, range(first, last))
            elif first < last:
                for kept in sequence.keep[g]:
                    self._index_pages(g, sequence, range(max(first, kept.start), min(last, kept.stop)))

    def _keep_end(self, sequence: _Sequence) -> None:
        """The next turn of a conversation resumes where this one ends: its windows are at hand, so keep them too."""
        tokens = sequence.computed // self.alignment * self.alignment
        for g, group in enumerate(self.groups):
            if group.policy.token_pages and not self._dense[g] and not sequence.image_tokens:
                window = group.policy.pages_of_hit(tokens // group.page_tokens, group.page_tokens)
                if all(i in sequence.pages[g] for i in window):
                    self._index_pages(g, sequence, window)

    def _index_pages(self, g: int, sequence: _Sequence, indices: range) -> None:
        index, key_of, held, keys = self._index[g], self._key[g], sequence.pages[g], sequence.keys[g]
        new = []
        for i in indices:
            page = held.get(i)
            if page is None or i >= len(keys) or page in key_of:
                continue
            if keys[i] not in index:
                index[keys[i]] = page
                key_of[page] = keys[i]
                new.append(i)
            # A second copy of known contents stays private: it is freed with its request.
            elif self._reach is not None and self._dense[g]:
                self._copies[g].setdefault(keys[i], []).append(page)
        if self._reach is not None and new:
            self._place(self._reach, g, new, sequence.keys)

    def _place(self, reach: Reach[int], g: int, indices: Sequence[int], keys: Keys) -> None:
        """Pages of these indices (ascending) are indexed now: say what they stand behind."""
        own, groups, first = keys[g], len(self.groups), indices[0]
        if len(self._chain) == 1 and self._dense[g] and indices[-1] - first < len(indices):  # nearly all pages
            run = [key * groups + g for key in own[max(0, first - 1) : indices[-1] + 1]]
            reach.add_run(run[1:] if first else run, run[0] if first else None)
            return
        for i in indices:
            before = page_before(self._chain, g, (i + 1) * self.groups[g].page_tokens)
            node = None if before is None else keys[before[0]][before[1]] * groups + before[0]
            reach.add(own[i] * groups + g, node)

    def _unindex(self, g: int, page: int) -> None:
        """The pool has evicted `page`, or what it holds is given up."""
        key = self._key[g].pop(page)
        copies = self._copies[g].get(key)
        if copies:
            copy = self._index[g][key] = copies.pop()
            self._key[g][copy] = key
            if not copies:
                del self._copies[g][key]
            return
        del self._index[g][key]
        if self._reach is not None:
            self._reach.remove(key * len(self.groups) + g)

    def _remove_copies(self, sequence: _Sequence) -> None:
        for g, copies in enumerate(self._copies):
            if not copies:
                continue
            keys, key_of = sequence.keys[g], self._key[g]
            for i, page in sequence.pages[g].items():
                if page not in key_of and i < len(keys) and page in copies.get(keys[i], ()):
                    copies[keys[i]].remove(page)
                    if not copies[keys[i]]:
                        del copies[keys[i]]

    def _drop_unreachable(self, node: int) -> None:
        key, g = divmod(node, len(self.groups))
        page = self._index[g][key]
        self.pool.forget(g, page)  # nobody holds it: what is before a page that is held stays indexed
        self._unindex(g, page)


def _cached_test(index: dict[int, int], keys: Sequence[int], coming: Container[int]) -> CachedTest:
    if coming:
        return lambda page: keys[page] in index or keys[page] in coming
    return lambda page: keys[page] in index


def _nothing_cached(page: int) -> bool:
    return False
