"""Which replica has which block in which layer group, and what that is worth to a prompt.

One integer per block says who has it: each (replica, group) owns one bit, its *lane*.  A prompt costs one look-up per
block, whatever the number of replicas; the lanes' columns over its blocks are then the groups' caches as `PageBits`,
and the engine's own hit rule is asked once per distinct set of columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import repeat
from operator import itemgetter

from jenga.hits import Hit
from jenga.policies.pages import PageBits
from jenga.routing.events import ON_DEVICE, BlockRemoved, BlockStored, Event, JunctionsLearned, Snapshot, keys_of
from jenga.routing.expected import Expected, Junctions, stored_by
from jenga.routing.prompts import PromptTree
from jenga.routing.rule import HitRule
from jenga.routing.sequence import Sequencer

NO_HIT = Hit(0, 0, None)
NO_LANE = 0
"""Stands for the lane of a group that never stored anything."""
EPOCHS_REMEMBERED = 8
"""Past engine processes of a replica whose late messages are known as such."""
SWEEP_FACTOR, SWEEP_MINIMUM = 4, 64
"""Entries looked at per block event (and per message) while lanes wait to be swept."""


@dataclass(frozen=True)
class AskReplay:
    """Batches are missing: ask the replica's replay socket for all from `first` on, then call `replay_ended`."""

    first: int


@dataclass(frozen=True)
class AskSnapshot:
    """What is missing cannot be replayed: fetch the replica's snapshot and call `load`."""


Need = AskReplay | AskSnapshot | None


@dataclass(frozen=True)
class IndexStats:
    """Size of the index and totals since it was made."""

    blocks: int
    """Distinct blocks known."""
    replicas: int
    trusted: int
    """Replicas whose cache is known exactly."""
    lanes: int
    """Bits per block in use, lanes that wait to be swept included."""
    batches: int
    """Batches applied."""
    block_events: int
    """Blocks stored and removed, all groups."""
    repeated: int
    """Batches that were known already."""
    gaps: int
    """Times that a batch was found missing."""
    restarts: int
    """Times that a replica's engine was replaced."""
    snapshots: int
    """Snapshots loaded."""
    inconsistent: int
    """Removals of what was not there; each costs the replica its trust until a snapshot is loaded."""


class _Replica:
    """What is known of one replica's stream."""

    __slots__ = ("broken", "copies", "epoch", "former", "junctions", "lanes", "rule", "sequencer")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.former: deque[int] = deque(maxlen=EPOCHS_REMEMBERED)
        self.start_over()

    def start_over(self) -> None:
        self.sequencer: Sequencer[tuple[Sequence[Event], HitRule | None]] = Sequencer()
        self.rule: HitRule | None = None
        self.broken = False
        self.junctions = Junctions()
        self.clear()

    def clear(self) -> None:
        self.lanes: dict[int, int] = {}  # group: its bit
        self.copies: dict[int, dict[int, int]] = {}  # group: block: pages beyond the first

    @property
    def trusted(self) -> bool:
        return self.rule is not None and not self.broken and self.sequencer.complete


class _Asked:
    """A hit rule that is asked about one cache after another, each given as columns of bits, the groups' first."""

    def __init__(self, rule: HitRule) -> None:
        self._rule = rule
        self._tests = [PageBits(0) for _ in rule.groups]
        self._caches = rule.caches(self._tests)

    def hit(self, columns: tuple[int, ...], prompt_tokens: int) -> Hit:
        for test, bits in zip(self._tests, columns, strict=False):
            test.bits = bits
        return self._rule.evaluate(self._caches, prompt_tokens)


@dataclass(frozen=True)
class _View:
    """What a question needs beside the blocks."""

    scales: list[tuple[int, int]]
    """Block hashes per page, and the lanes whose pages are of that many."""
    empty: dict[int, int]
    """A column without pages for each lane."""
    replicas: list[tuple[str, _Replica, _Asked | None, Callable[[dict[int, int]], tuple[int, ...]]]]
    """Name, stream, rule, and how to take the replica's columns out of all."""
    namings: list[tuple[HitRule, frozenset[str]]]


class BlockIndex:
    """The caches of one model's replicas.  Not thread-safe; nothing in it waits."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self._replicas: dict[str, _Replica] = {}
        self._free_lanes: list[int] = []
        self._lanes = 0  # numbers handed out so far
        self._retired = 0  # lanes to be swept
        self._sweep: Iterator[int] | None = None
        self._sweeping = 0  # lanes that the sweep under way clears
        self._view: _View | None = None  # None: replicas, rules or lanes have changed
        self._prompts = PromptTree()  # not computed yet: all their pages of full attention
        self._expected = Expected()  # and what they keep in other groups
        self._taught: dict[str, Junctions] = {}  # by requests on their way, which teach them something
        self._batches = self._block_events = self._repeated = self._gaps = 0
        self._restarts = self._snapshots = self._inconsistent = 0

    # -- the stream -----------------------------------------------------------------------------------------

    def apply(
        self, replica: str, epoch: int, sequence: int, events: Sequence[Event], rule: HitRule | None = None
    ) -> Need:
        """Take one batch, in any order; what to do about the stream, if anything.

        An `epoch` other than the last one is a new engine: what the old one had is forgotten at once.
        """
        stream = self._stream(replica, epoch)
        if stream is None:
            self._repeated += 1
            return None
        sequencer = stream.sequencer
        if sequence < sequencer.due:
            self._repeated += 1
        elif sequence > sequencer.due and sequencer.complete:
            self._gaps += 1
        self._ingest(stream, sequencer.offer(sequence, (events, rule)))
        return self._need(stream)

    def reached(self, replica: str, epoch: int, sequence: int) -> Need:
        """Learn by other means that a replica's next batch will be `sequence`: finds a loss at the stream's end."""
        stream = self._stream(replica, epoch)
        if stream is None:
            return None
        if stream.sequencer.complete and sequence > stream.sequencer.due:
            self._gaps += 1
        stream.sequencer.exists(sequence - 1)
        return self._need(stream)

    def describe(self, replica: str, epoch: int, rule: HitRule) -> None:
        """Give the hit rule of a replica whose stream does not carry one (vLLM without the plugin)."""
        stream = self._stream(replica, epoch)
        if stream is not None:
            self._set_rule(stream, rule)

    def replay_ended(self, replica: str, epoch: int, first: int) -> Need:
        """A replay asked for from `first` on has been applied to its end; what to do next.

        If it did not hold `first`, only a snapshot helps.
        """
        stream = self._replicas.get(replica)
        if stream is None or stream.epoch != epoch:
            return None
        if not stream.sequencer.complete and stream.sequencer.due <= first:
            return AskSnapshot()
        return self._need(stream)

    def load(self, replica: str, snapshot: Snapshot) -> Need:
        """Replace what is known of a replica by a snapshot; batches that came meanwhile are applied on top."""
        stream = self._stream(replica, snapshot.epoch)
        if stream is None:
            return None
        if snapshot.sequence < stream.sequencer.due and not stream.broken and stream.rule is not None:
            return self._need(stream)  # older than what is known
        self._retire(stream)
        stream.broken = False
        if snapshot.rule is not None:
            self._set_rule(stream, snapshot.rule)
        stream.junctions = Junctions(snapshot.junctions)
        for group, contents in enumerate(snapshot.groups):
            if contents.blocks:
                self._store(contents.blocks, self._lane(stream, group), stream.copies.setdefault(group, {}), 1)
                stream.copies[group].update({key: pages - 1 for key, pages in contents.copies.items() if pages > 1})
            self._block_events += len(contents.blocks)
        self._snapshots += 1
        self._ingest(stream, stream.sequencer.skip_to(snapshot.sequence))
        return self._need(stream)

    def forget(self, replica: str) -> None:
        """The replica is gone.  An unknown one is no error."""
        stream = self._replicas.pop(replica, None)
        if stream is not None:
            self._retire(stream)

    def sweep(self, entries: int) -> bool:
        """Clear up after replicas that are gone, at most `entries` blocks; whether anything is left to do.

        Each message sweeps a little; a router with nothing to do may call this too.
        """
        if self._sweep is None:
            if not self._retired:
                return False
            self._sweep, self._sweeping, self._retired = iter(list(self._blocks)), self._retired, 0
        blocks, gone = self._blocks, self._sweeping
        for _ in range(entries):
            key = next(self._sweep, None)
            if key is None:
                while gone:
                    lane = gone & -gone
                    heappush(self._free_lanes, lane.bit_length() - 1)
                    gone ^= lane
                self._sweep, self._sweeping = None, 0
                return bool(self._retired)
            holders = blocks.get(key, 0)
            if holders & gone:
                if kept := holders & ~gone:
                    blocks[key] = kept
                else:
                    del blocks[key]
        return True

    # -- requests on their way ------------------------------------------------------------------------------

    def book(self, replica: str, request: str, tokens: Sequence[int], keys: Sequence[int], hit: Hit) -> None:
        """`request`, a prompt of `tokens` with the block `keys`, was sent to a replica where it will find `hit`.

        What it will store counts until `settle`.  An unknown replica is no error.
        """
        self.settle(request)
        stream = self._replicas.get(replica)
        if stream is None or stream.rule is None or not stream.trusted:
            return
        rule = stream.rule
        if hit.furthest > hit.tokens:
            stream.junctions.expect(request, keys[hit.furthest // rule.hash_tokens - 1])
            self._taught[request] = stream.junctions
        dense, told = 0, False
        for number, pages in enumerate(stored_by(rule, tokens, keys, hit, stream.junctions)):
            lane, group = self._lane(stream, number), rule.groups[number]
            if group.policy.token_pages and not told:
                scale = group.page_tokens // rule.hash_tokens
                if (whole := len(keys) // scale) > hit.tokens // group.page_tokens:
                    told = True
                    self._expected.ends_with(request, lane, keys[whole * scale - 1])
            if group.dense:
                dense |= lane
            else:
                self._expected.add(request, lane, [key for key in pages if not self._blocks.get(key, 0) & lane])
        if dense and told:
            self._prompts.add(request, dense, keys)

    def settle(self, request: str) -> None:
        """`request` is done: nothing more comes of it."""
        self._prompts.settle(request)
        self._expected.settle(request)
        if (junctions := self._taught.pop(request, None)) is not None:
            junctions.settle(request)

    def take_computed(self) -> list[str]:
        """Booked requests whose prompts have been computed since the last call, as far as events tell."""
        return self._expected.take_computed()

    # -- questions ------------------------------------------------------------------------------------------

    def hits(self, keys: Sequence[int], prompt_tokens: int) -> dict[str, Hit]:
        """What each replica's cache is worth to a prompt of `prompt_tokens` tokens.

        `keys` are the `key_of` of the prompt's block hashes, in order.  A replica whose cache is not known exactly
        counts as empty; what is said of one that names blocks otherwise (`HitRule.naming`) means nothing.
        """
        view = self._view or self._look()
        columns = view.empty.copy()  # lane: the pages it has, as bits
        get, coming = self._blocks.get, self._expected.blocks
        for scale, lanes in view.scales:
            before = holders = 0
            pages = len(keys) // scale
            everything = (1 << pages) - 1
            names = keys if scale == 1 else keys[scale - 1 :: scale]
            held = list(map(get, names, repeat(0)))
            if not coming.keys().isdisjoint(names):
                held = [now | coming.get(key, 0) for now, key in zip(held, names, strict=True)]
            for page, now in enumerate(held):
                if now == holders:
                    continue
                holders = now
                changed = (now & lanes) ^ before
                before ^= changed
                from_here = everything >> page << page
                while changed:
                    lane = changed & -changed
                    changed ^= lane
                    columns[lane] ^= from_here
        for lanes, blocks in self._prompts.shared(keys):
            for scale, alike in view.scales:
                coming_pages, left = (1 << blocks // scale) - 1, lanes & alike
                while left:
                    lane = left & -left
                    left ^= lane
                    columns[lane] |= coming_pages
        known: dict[tuple[_Asked, tuple[int, ...]], Hit] = {}
        hits = {}
        for name, stream, asked, caches in view.replicas:
            if asked is None or not stream.trusted:
                hits[name] = NO_HIT
                continue
            cached = caches(columns)
            # Replicas with equal caches, so far as this prompt sees them, share one evaluation.
            hit = known.get((asked, cached))
            if hit is None:
                hit = known[asked, cached] = asked.hit(cached, prompt_tokens)
            hits[name] = hit
        return hits

    def trusted(self, replica: str) -> bool:
        """Whether the replica's cache is known exactly."""
        stream = self._replicas.get(replica)
        return stream is not None and stream.trusted

    def epoch(self, replica: str) -> int | None:
        """Engine process of which the index knows, None if the replica is unknown."""
        stream = self._replicas.get(replica)
        return None if stream is None else stream.epoch

    def due(self, replica: str) -> int | None:
        """Number of the batch that the index waits for, None if the replica is unknown."""
        stream = self._replicas.get(replica)
        return None if stream is None else stream.sequencer.due

    def rule(self, replica: str) -> HitRule | None:
        """The replica's hit rule, None if it is not known."""
        stream = self._replicas.get(replica)
        return None if stream is None else stream.rule

    def replicas(self) -> tuple[str, ...]:
        """Names of all replicas heard of."""
        return tuple(self._replicas)

    def namings(self) -> Sequence[tuple[HitRule, frozenset[str]]]:
        """The replicas with a rule, by how they name blocks, each with one of their rules.

        More than one entry means that an update is rolling out, or that engines differ in hash algorithm or seed.
        """
        return (self._view or self._look()).namings

    def contents(self, replica: str) -> Snapshot:
        """What the index believes a replica has cached (O(blocks)): for tests and for handing on.

        Raises:
            KeyError: the replica is unknown.
        """
        stream = self._replicas[replica]
        groups = range(max((len(stream.rule.groups) if stream.rule else 0), *(g + 1 for g in stream.lanes), 0))

        def pages(group: int) -> Iterable[int]:
            lane, copies = stream.lanes.get(group, 0), stream.copies.get(group, {})
            for key, holders in self._blocks.items():
                if holders & lane:
                    yield from (key for _ in range(1 + copies.get(key, 0)))

        junctions = [key for key in stream.junctions if isinstance(key, int)]
        return Snapshot.of(stream.epoch, stream.sequencer.due, stream.rule, map(pages, groups), junctions)

    def stats(self) -> IndexStats:
        """Size and totals."""
        return IndexStats(
            blocks=len(self._blocks),
            replicas=len(self._replicas),
            trusted=sum(stream.trusted for stream in self._replicas.values()),
            lanes=self._lanes - len(self._free_lanes),
            batches=self._batches,
            block_events=self._block_events,
            repeated=self._repeated,
            gaps=self._gaps,
            restarts=self._restarts,
            snapshots=self._snapshots,
            inconsistent=self._inconsistent,
        )

    # -- internals ------------------------------------------------------------------------------------------

    def _stream(self, replica: str, epoch: int) -> _Replica | None:
        """The stream of this engine process; None if a later one has taken its place."""
        stream = self._replicas.get(replica)
        if stream is None:
            stream = self._replicas[replica] = _Replica(epoch)
            self._view = None
        elif stream.epoch != epoch:
            if epoch in stream.former:
                return None
            self._restarts += 1
            self._retire(stream)
            stream.former.append(stream.epoch)
            stream.epoch = epoch
            stream.start_over()
        return stream

    def _need(self, stream: _Replica) -> Need:
        if stream.broken:
            return AskSnapshot()
        if not stream.sequencer.complete:
            return AskReplay(stream.sequencer.due)
        return None

    def _ingest(self, stream: _Replica, ready: list[tuple[Sequence[Event], HitRule | None]]) -> None:
        before = self._block_events
        for events, rule in ready:
            self._batches += 1
            if rule is not None:
                self._set_rule(stream, rule)
            for event in events:
                if isinstance(event, BlockStored):
                    if event.copies and event.medium in (ON_DEVICE, None):
                        group = event.group_idx or 0
                        lane = stream.lanes.get(group) or self._lane(stream, group)
                        self._store(keys_of(event.block_hashes), lane, stream.copies[group], event.copies)
                        self._block_events += len(event.block_hashes)
                elif isinstance(event, BlockRemoved):
                    if event.medium in (ON_DEVICE, None):
                        self._remove(stream, event.group_idx or 0, keys_of(event.block_hashes))
                        self._block_events += len(event.block_hashes)
                elif isinstance(event, JunctionsLearned):
                    stream.junctions.tell(keys_of(event.block_hashes))
                else:
                    self._retire(stream)
                    stream.broken = False
        if self._retired or self._sweep is not None:
            self.sweep(SWEEP_MINIMUM + SWEEP_FACTOR * (self._block_events - before))

    def _store(self, keys: list[int], lane: int, copies: dict[int, int], pages: int) -> None:
        blocks = self._blocks
        get = blocks.get
        for request in self._expected.arrived(lane, keys):
            self._prompts.settle(request)
        for key in keys:
            holders = get(key)
            if holders is None:
                blocks[key] = lane
            elif not holders & lane:
                blocks[key] = holders | lane
            else:
                copies[key] = copies.get(key, 0) + 1
        if pages > 1:
            for key in keys:
                copies[key] = copies.get(key, 0) + pages - 1

    def _remove(self, stream: _Replica, group: int, keys: list[int]) -> None:
        blocks = self._blocks
        get = blocks.get
        lane, copies = stream.lanes.get(group, 0), stream.copies.get(group, {})
        for key in keys:
            if copies and key in copies:
                if copies[key] > 1:
                    copies[key] -= 1
                else:
                    del copies[key]
                continue
            holders = get(key, 0)
            if not holders & lane:
                self._inconsistent += 1
                stream.broken = True
            elif holders == lane:
                del blocks[key]
            else:
                blocks[key] = holders ^ lane

    def _lane(self, stream: _Replica, group: int) -> int:
        """The bit of a replica's group, given out when it is first needed."""
        lane = stream.lanes.get(group)
        if lane is None:
            if self._free_lanes:
                lane = 1 << heappop(self._free_lanes)
            else:
                lane = 1 << self._lanes
                self._lanes += 1
            stream.lanes[group] = lane
            stream.copies[group] = {}
            self._view = None
        return lane

    def _retire(self, stream: _Replica) -> None:
        """Forget what a replica has, in constant time: its lanes are swept from the blocks later, then used again."""
        for lane in stream.lanes.values():
            self._retired |= lane
        self._expected.forget(stream.lanes.values())
        self._prompts.forget(sum(stream.lanes.values()))
        stream.clear()
        self._view = None

    def _set_rule(self, stream: _Replica, rule: HitRule) -> None:
        stream.rule = next((known for known in self._rules() if known == rule), rule)
        self._view = None

    def _rules(self) -> Iterable[HitRule]:
        """The distinct rules; `_set_rule` sees to it that equal ones are one object."""
        return {id(stream.rule): stream.rule for stream in self._replicas.values() if stream.rule is not None}.values()

    def _look(self) -> _View:
        """Arrange for questions what changes seldom: replicas, their rules and lanes."""
        asked = {id(rule): _Asked(rule) for rule in self._rules()}
        scales: dict[int, int] = {}
        replicas: list[tuple[str, _Replica, _Asked | None, Callable[[dict[int, int]], tuple[int, ...]]]] = []
        for name, stream in self._replicas.items():
            groups = stream.rule.groups if stream.rule else ()
            lanes = [stream.lanes.get(number, NO_LANE) for number in range(len(groups))]
            for group, lane in zip(groups, lanes, strict=True):
                scale = group.page_tokens // stream.rule.hash_tokens if stream.rule else 1
                scales[scale] = scales.get(scale, 0) | lane
            # With two lanes more than there are groups the getter always answers with a tuple.
            replicas.append((name, stream, asked.get(id(stream.rule)), itemgetter(*lanes, NO_LANE, NO_LANE)))
        empty = {lane: 0 for stream in self._replicas.values() for lane in stream.lanes.values()} | {NO_LANE: 0}
        named: dict[tuple[int, str], list[tuple[str, HitRule]]] = {}
        for name, stream in self._replicas.items():
            if stream.rule:
                named.setdefault(stream.rule.naming, []).append((name, stream.rule))
        namings = [(alike[0][1], frozenset(name for name, _ in alike)) for alike in named.values()]
        self._view = _View(list(scales.items()), empty, replicas, namings)
        return self._view
