"""The index against a plain model: what each replica had after each of its batches, and one replica asked at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from jenga.hits import Hit
from jenga.policies import ChunkedLocal, FullAttention, RecurrentState, SlidingWindow
from jenga.routing import AskReplay, AskSnapshot, BlockIndex, GroupRule, HitRule, Snapshot, decode
from jenga.routing.events import AllBlocksCleared, BlockRemoved, BlockStored

RULES = (
    HitRule(
        (
            GroupRule("full", FullAttention(), 2),
            GroupRule("window", SlidingWindow(5), 2),
            GroupRule("state", RecurrentState(), 4),
        ),
        alignment=4,
        hash_tokens=2,
        root="ab",
    ),
    HitRule((GroupRule("full", FullAttention(), 2), GroupRule("local", ChunkedLocal(6), 2)), 2, 2, "ab"),
    HitRule((GroupRule("state", RecurrentState(), 2),), 2, 2, "ab"),
    HitRule((GroupRule("full", FullAttention(), 2),), 2, 2, "ab"),
)
KEYS = 14
"""Blocks that exist; a prompt is some of them in some order."""
prompts = st.tuples(st.permutations(range(KEYS)), st.integers(0, 2 * KEYS + 2))

Cache = list[Counter[int]]


def believed(index: BlockIndex, replica: str, groups: int) -> Cache:
    """What the index thinks a replica has, by group."""
    found = [
        Counter({key: group.copies.get(key, 1) for key in group.blocks}) for group in index.contents(replica).groups
    ]
    return found + [Counter() for _ in range(groups - len(found))]


def brute_force(hit_rule: HitRule, cache: Cache, keys: Sequence[int], tokens: int) -> Hit:
    """The hit of one replica by the engine's rule, from sets."""

    def test(group: int):
        scale = hit_rule.groups[group].page_tokens // hit_rule.hash_tokens
        return lambda page: (page + 1) * scale <= len(keys) and keys[(page + 1) * scale - 1] in cache[group]

    return hit_rule.hit([test(group) for group in range(len(hit_rule.groups))], tokens)


@dataclass
class Engine:
    """One engine process, its cache, and all it ever sent."""

    epoch: int
    hit_rule: HitRule
    as_bytes: bool
    cache: Cache = field(init=False)
    sent: list[bytes] = field(default_factory=list)
    past: list[Cache] = field(default_factory=list)
    """The cache before each batch, and after the last."""
    waiting: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = [Counter() for _ in self.hit_rule.groups]
        self.past.append(self.copy())

    def copy(self) -> Cache:
        return [Counter(group) for group in self.cache]

    def name(self, key: int) -> int | bytes:
        return b"\xff" * 24 + key.to_bytes(8, "big") if self.as_bytes else key

    def store(self, group: int, keys: Sequence[int]) -> None:
        self.cache[group].update(keys)
        self.waiting.append(
            {
                "type": "BlockStored",
                "block_hashes": [self.name(key) for key in keys],
                "parent_block_hash": None,
                "token_ids": [1, 2, 3],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "group_idx": group,
                "a_field_of_the_future": {"x": [1]},
            }
        )

    def report(self, group: int, keys: Sequence[int], **how: object) -> None:
        """Events that change nothing: reports of what is stored already, and other media."""
        self.store(group, keys)
        self.cache[group].subtract(keys)
        self.cache[group] += Counter()
        self.waiting[-1].update(how)

    def remove(self, group: int, keys: Sequence[int]) -> None:
        self.cache[group].subtract(keys)
        self.cache[group] += Counter()
        self.waiting.append(
            {
                "type": "BlockRemoved",
                "block_hashes": [self.name(key) for key in keys],
                "medium": "GPU",
                "group_idx": group,
            }
        )

    def clear(self) -> None:
        self.cache = [Counter() for _ in self.cache]
        self.waiting.append({"type": "AllBlocksCleared"})

    def publish(self) -> int:
        header: dict[str, object] = {"epoch": self.epoch}
        if not self.sent:
            header["rule"] = self.hit_rule.to_dict()
        first = {"type": "BlockRemoved", "block_hashes": [], "medium": None, "stream": header}
        self.sent.append(msgspec.msgpack.encode([1.5, [first, *self.waiting], 0]))
        self.past.append(self.copy())
        self.waiting = []
        return len(self.sent) - 1

    def snapshot(self) -> Snapshot:
        if self.waiting:
            self.publish()
        pages = [[self.name(key) for key in group.elements()] for group in self.cache]
        taken = Snapshot.of(self.epoch, len(self.sent), self.hit_rule, pages)
        return Snapshot.from_dict(msgspec.msgpack.decode(msgspec.msgpack.encode(taken.to_dict())))


class IndexMachine(RuleBasedStateMachine):
    """Engines, a lossy network, and a transport that does what it is asked, when it comes to it."""

    messages = Bundle("messages")  # (replica, engine, number), on their way
    snapshots = Bundle("snapshots")
    names = st.sampled_from(["a", "b", "c"])
    fates = st.sampled_from(["arrive"] * 6 + ["come later", "arrive twice", "get lost"])

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex()
        self.engines: dict[str, Engine] = {}
        self.epochs: dict[int, Engine] = {}
        self.needs: dict[str, AskReplay | AskSnapshot | None] = {}

    def start(self, name: str, which: int, as_bytes: bool) -> None:
        engine = Engine(len(self.epochs) + 1, RULES[which], as_bytes)
        self.engines[name] = self.epochs[engine.epoch] = engine

    @initialize(which=st.lists(st.integers(0, len(RULES) - 1), min_size=3, max_size=3))
    def begin(self, which: list[int]) -> None:
        for name, number in zip("abc", which, strict=True):
            self.start(name, number, as_bytes=number == 1)

    # -- engines

    @rule(target=messages, name=names, rng=st.randoms(use_true_random=False), fate=fates)
    def run(self, name: str, rng: random.Random, fate: str) -> object:
        """A step of an engine: a few changes, published as one batch, which mostly arrives at once."""
        engine = self.engines[name]
        for _ in range(rng.randrange(1, 5)):
            group = rng.randrange(len(engine.cache))
            present = sorted(engine.cache[group].elements())
            keys = [rng.randrange(KEYS) for _ in range(rng.randrange(1, 6))]
            match rng.choice(("store", "store", "store", "remove", "remove", "report", "other medium", "clear?")):
                case "store":
                    engine.store(group, keys)
                case "remove" if present:
                    engine.remove(group, rng.sample(present, min(len(present), len(keys))))
                case "report":
                    engine.report(group, keys, copies=0)
                case "other medium":
                    engine.report(group, keys, medium="CPU")
                case "clear?" if rng.random() < 0.2:
                    engine.clear()
        if not engine.waiting:
            return multiple()
        message = (name, engine, engine.publish())
        if fate in ("arrive", "arrive twice"):
            self.deliver(*message)
        return message if fate in ("come later", "arrive twice") else multiple()

    @rule(name=names, which=st.integers(0, len(RULES) - 1), as_bytes=st.booleans())
    def restart(self, name: str, which: int, as_bytes: bool) -> None:
        self.start(name, which, as_bytes)

    # -- network: messages come in order, in any other, twice, or not at all

    def deliver(self, name: str, engine: Engine, number: int) -> None:
        batch = decode(engine.sent[number])
        assert batch.epoch == engine.epoch
        self.needs[name] = self.index.apply(name, engine.epoch, number, batch.events, batch.rule)

    @rule(message=consumes(messages))
    def arrive(self, message: tuple[str, Engine, int]) -> None:
        self.deliver(*message)

    # -- transport

    @rule(name=names, kept=st.integers(0, 6))
    def mend(self, name: str, kept: int) -> None:
        """Do what was asked last; the replay buffer holds the last `kept` batches."""
        engine, need = self.engines[name], self.needs.get(name)
        if isinstance(need, AskReplay):
            for number in range(max(need.first, len(engine.sent) - kept), len(engine.sent)):
                self.deliver(name, engine, number)
            self.needs[name] = self.index.replay_ended(name, engine.epoch, need.first)
        elif isinstance(need, AskSnapshot):
            self.needs[name] = self.index.load(name, engine.snapshot())

    @rule(target=snapshots, name=names)
    def take_snapshot(self, name: str) -> tuple[str, Snapshot]:
        return name, self.engines[name].snapshot()

    @rule(taken=snapshots)
    def load_it_late(self, taken: tuple[str, Snapshot]) -> None:
        name, snapshot = taken
        self.needs[name] = self.index.load(name, snapshot)

    @rule(name=names)
    def hear_how_far_it_is(self, name: str) -> None:
        engine = self.engines[name]
        self.needs[name] = self.index.reached(name, engine.epoch, len(engine.sent))

    @rule(name=names)
    def forget(self, name: str) -> None:
        self.index.forget(name)
        self.index.forget(name)
        assert name not in self.index.replicas()

    @rule(entries=st.integers(1, 20))
    def sweep(self, entries: int) -> None:
        self.index.sweep(entries)

    @rule(name=names)
    def a_willing_transport_always_gets_there(self, name: str) -> None:
        engine = self.engines[name]
        need = self.index.reached(name, engine.epoch, len(engine.sent))
        for _ in range(3):
            if isinstance(need, AskReplay):
                for number in range(max(need.first, len(engine.sent) - 2), len(engine.sent)):
                    self.deliver(name, engine, number)
                need = self.index.replay_ended(name, engine.epoch, need.first)
            elif isinstance(need, AskSnapshot):
                need = self.index.load(name, engine.snapshot())
        assert need is None
        self.needs[name] = None
        if self.index.epoch(name) == engine.epoch:
            assert self.index.due(name) == len(engine.sent)
            assert self.index.trusted(name) or not engine.sent

    # -- what must hold

    def truth(self, name: str) -> tuple[HitRule, Cache] | None:
        """What a trusted replica had after the batches that the index has taken from it."""
        if not self.index.trusted(name):
            return None
        engine = self.epochs[self.index.epoch(name) or 0]
        return engine.hit_rule, engine.past[self.index.due(name) or 0]

    @invariant()
    def trusted_replicas_are_known_exactly(self) -> None:
        for name in self.index.replicas():
            if (truth := self.truth(name)) is not None:
                assert self.index.rule(name) == truth[0]
                assert believed(self.index, name, len(truth[1])) == truth[1]

    @rule(prompt=prompts)
    def hits_are_those_of_each_replica_alone(self, prompt: tuple[list[int], int]) -> None:
        keys, tokens = prompt
        keys = keys[: tokens // 2]
        hits = self.index.hits(keys, tokens)
        assert set(hits) == set(self.index.replicas())
        for name, hit in hits.items():
            truth = self.truth(name)
            assert hit == (Hit(0, 0, None) if truth is None else brute_force(*truth, keys, tokens))

    def teardown(self) -> None:
        while self.index.sweep(7):
            pass
        known = {
            key for name in self.index.replicas() for group in self.index.contents(name).groups for key in group.blocks
        }
        assert self.index.stats().blocks == len(known), "blocks that nobody has are still there"
        for name in self.index.replicas():
            self.index.forget(name)
        while self.index.sweep(1000):
            pass
        assert self.index.stats().blocks == self.index.stats().lanes == 0


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[tuple[HitRule, Cache]], list[int], int]:
    """Replicas with prefixes of one prompt and holes in them, under several rules."""
    length = draw(st.integers(1, 40))
    keys = list(range(100, 100 + length))
    rng = draw(st.randoms(use_true_random=False))
    fleet = []
    for _ in range(draw(st.integers(1, 8))):
        hit_rule = draw(st.sampled_from(RULES))
        reach, density = rng.randrange(length + 1), rng.choice([0.6, 0.95, 1.0])
        fleet.append((hit_rule, [Counter(k for k in keys[:reach] if rng.random() < density) for _ in hit_rule.groups]))
    return fleet, keys, draw(st.integers(0, 2 * length + 3))


@settings(max_examples=300)
@given(fleets())
def test_all_replicas_at_once_equal_each_alone(case: tuple[list[tuple[HitRule, Cache]], list[int], int]) -> None:
    fleet, keys, tokens = case
    index = BlockIndex()
    for number, (hit_rule, cache) in enumerate(fleet):
        assert index.load(str(number), Snapshot.of(1, 5, hit_rule, cache)) is None
    hits = index.hits(keys, tokens)
    assert hits == {str(n): brute_force(*replica, keys, tokens) for n, replica in enumerate(fleet)}


def stored(keys: Sequence[int], group: int = 0) -> Iterator[object]:
    """A batch's events, as decoded."""
    engine = Engine(1, RULES[0], as_bytes=False)
    engine.store(group, keys)
    engine.publish()
    yield from decode(engine.sent[0]).events


def test_what_the_transport_is_asked_for() -> None:
    index = BlockIndex()
    assert index.apply("a", 1, 0, list(stored([1])), RULES[0]) is None
    assert index.trusted("a")
    assert index.apply("a", 1, 2, list(stored([2]))) == AskReplay(1)
    assert not index.trusted("a")
    assert index.hits([1], 4)["a"] == Hit(0, 0, None)
    assert index.apply("a", 1, 3, list(stored([3]))) == AskReplay(1)
    assert index.replay_ended("a", 1, 1) == AskSnapshot()  # the buffer had nothing so old
    assert index.apply("a", 1, 1, list(stored([4]))) is None  # late, not lost
    assert index.trusted("a")
    assert index.due("a") == 4
    assert index.reached("a", 1, 6) == AskReplay(4)
    assert index.reached("a", 2, 0) is None  # a new engine, with nothing cached
    assert index.apply("a", 1, 4, list(stored([5]))) is None  # the old one's last words
    assert index.epoch("a") == 2
    assert index.stats().restarts == 1
    assert index.stats().gaps == 2
    assert index.replay_ended("nobody", 1, 0) is None


def test_a_removal_of_what_was_not_there_costs_the_trust() -> None:
    index = BlockIndex()
    engine = Engine(1, RULES[2], as_bytes=False)
    engine.store(0, [1])
    engine.publish()
    engine.waiting = [{"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU", "group_idx": 0}]
    engine.publish()
    for number, need in ((0, None), (1, AskSnapshot())):
        batch = decode(engine.sent[number])
        assert index.apply("a", 1, number, batch.events, batch.rule) == need
    assert not index.trusted("a")
    assert index.stats().inconsistent == 1
    assert index.load("a", engine.snapshot()) is None
    assert index.trusted("a")
    index.apply("a", 1, 2, [BlockRemoved([3])])
    assert not index.trusted("a")
    assert index.apply("a", 1, 3, [AllBlocksCleared()]) is None
    assert index.trusted("a")  # nothing is cached, that is sure


def test_batches_that_came_early_are_applied_on_top_of_a_snapshot() -> None:
    index = BlockIndex()
    for number in (3, 5, 6, 8):
        assert index.apply("a", 1, number, [BlockStored([number])]) == AskReplay(0)
    assert index.load("a", Snapshot.of(1, 5, RULES[3], [[1]])) == AskReplay(7)
    assert not index.trusted("a")
    assert index.apply("a", 1, 7, []) is None
    assert index.due("a") == 9
    assert believed(index, "a", 1) == [Counter([1, 5, 6, 8])]
    assert index.load("a", Snapshot.of(1, 4, RULES[3], [[2]])) is None  # older than what is known
    assert index.due("a") == 9


def test_a_group_that_stores_for_the_first_time_counts_at_once() -> None:
    index = BlockIndex()
    for number, (group, tokens) in enumerate(((0, 0), (1, 0), (2, 4))):
        index.apply("a", 1, number, [BlockStored([10, 11], group)], RULES[0] if number == 0 else None)
        assert index.hits([10, 11], 9)["a"].tokens == tokens


def test_equal_caches_under_unlike_rules_are_not_worth_the_same() -> None:
    index = BlockIndex()
    for name, hit_rule in (("state", RULES[2]), ("full", RULES[3]), ("state too", RULES[2])):
        index.load(name, Snapshot.of(1, 0, hit_rule, [[11]]))
    assert {name: hit.tokens for name, hit in index.hits([10, 11], 9).items()} == {
        "state": 4,
        "full": 0,
        "state too": 4,
    }


def test_a_stream_without_a_rule_waits_for_one() -> None:
    index = BlockIndex()
    index.apply("stock", 0, 0, list(stored([1, 2])))
    assert index.hits([1, 2], 9)["stock"] == Hit(0, 0, None)
    index.describe("stock", 0, HitRule((GroupRule("full", FullAttention(), 2),), 2, 2, ""))
    assert index.hits([1, 2], 9)["stock"].tokens == 4


def test_many_restarts_neither_grow_the_index_nor_its_blocks() -> None:
    index, rng = BlockIndex(), random.Random(1)
    for epoch in range(1, 200):
        for replica in "ab":
            keys = [rng.getrandbits(64) for _ in range(20)]
            index.apply(replica, epoch, 0, list(stored(keys)), RULES[0])
    assert index.stats().blocks < 40 * 6
    assert index.stats().lanes < 2 * 8


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x93nonsense", "no batch of KV events"),
        (msgspec.msgpack.encode([1.0, [{"type": "Unheard"}]]), "no batch of KV events"),
        (
            msgspec.msgpack.encode(
                [1.0, [{"type": "BlockRemoved", "block_hashes": [], "stream": {"epoch": 1, "rule": {"schema": 99}}}]]
            ),
            "schema 99",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(payload)


@pytest.mark.parametrize("hit_rule", RULES)
def test_rules_travel(hit_rule: HitRule) -> None:
    assert HitRule.from_dict(msgspec.json.decode(msgspec.json.encode(hit_rule.to_dict()))) == hit_rule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [{"name": "x", "kind": "telepathy", "parameters": {}, "page_tokens": 2}]}, "unknown layer type"),
        (
            {"groups": [{"name": "x", "kind": "full_attention", "parameters": {"w": 1}, "page_tokens": 2}]},
            "no hit rule",
        ),
        (
            {"groups": [{"name": "x", "kind": "full_attention", "parameters": {}, "page_tokens": 3}]},
            "no multiple of the",
        ),
        ({"alignment": 3}, "alignment 3 is no multiple of group full's 2"),
        ({"alignment": None}, "no hit rule"),
    ],
)
def test_rules_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HitRule.from_dict({**RULES[0].to_dict(), **change})


def test_a_snapshot_that_lacks_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match="no snapshot: KeyError: 'sequence'"):
        Snapshot.from_dict({"epoch": 1})
