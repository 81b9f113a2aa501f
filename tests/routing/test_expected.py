"""Requests on their way: what they will store counts before the engine tells of it, and never longer than that."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import msgspec
import pytest

from jenga.checkpoints import SharedPrefixes
from jenga.hits import Hit
from jenga.policies import FullAttention, RecurrentState, SlidingWindow
from jenga.routing import BlockIndex, GroupRule, HitRule
from jenga.routing.events import AllBlocksCleared, BlockRemoved, BlockStored, JunctionsLearned, Snapshot, decode
from jenga.routing.expected import Junctions, stored_by
from jenga.routing.index import NO_HIT

MARK = 9
RULE = HitRule(
    (
        GroupRule("full", FullAttention(), 16),
        GroupRule("window", SlidingWindow(40), 16),
        GroupRule("state", RecurrentState(), 16),
    ),
    16,
    16,
    "ab",
    frozenset({MARK}),
)
SYSTEM = 320
"""Tokens of the turn that prompts share."""


def prompt(length: int, seed: int) -> tuple[list[int], list[int]]:
    """Tokens and keys of a prompt: a shared first turn, then one of its own."""
    shared = [MARK] * 1 + [1] * (SYSTEM - 2) + [MARK]
    tokens = shared + [100 + seed] * (length - SYSTEM)
    keys = [i if (i + 1) * 16 <= SYSTEM else 1000 * (seed + 1) + i for i in range(length // 16)]
    return tokens, keys


def index(*replicas: str) -> BlockIndex:
    made = BlockIndex()
    for replica in replicas:
        made.apply(replica, 1, 0, [], RULE)
    return made


def hit(made: BlockIndex, keys: list[int], tokens: list[int], replica: str = "r") -> Hit:
    return made.hits(keys, len(tokens))[replica]


def stored(pages: list[list[int]]) -> list[BlockStored]:
    return [BlockStored(keys, group) for group, keys in enumerate(pages) if keys]


def test_what_is_on_its_way_counts_until_it_is_settled() -> None:
    made = index("r", "other")
    tokens, keys = prompt(700, 0)
    made.book("r", "a", tokens, keys, NO_HIT)
    other, names = prompt(800, 1)
    assert hit(made, names, other).tokens == SYSTEM, "the turn's start is where the engine keeps a state"
    assert hit(made, keys, tokens).tokens == 688, "and the prompt's end"
    assert hit(made, names, other, "other").tokens == 0
    made.settle("a")
    made.settle("a")
    assert hit(made, keys, tokens).furthest == 0


def test_what_has_arrived_lives_and_dies_by_events() -> None:
    made = index("r")
    tokens, keys = prompt(700, 0)
    pages = stored_by(RULE, tokens, keys, NO_HIT, SharedPrefixes())
    for request in ("a", "b"):
        made.book("r", request, tokens, keys, NO_HIT)
    made.apply("r", 1, 1, stored(pages))
    assert hit(made, keys, tokens).tokens == 688
    gone = [BlockRemoved(names, group) for group, names in enumerate(pages)]
    made.apply("r", 1, 2, gone)
    assert hit(made, keys, tokens).furthest == 0, "evicted while both requests still run"
    made.book("r", "c", tokens, keys, NO_HIT)
    made.settle("a")
    made.settle("b")
    assert hit(made, keys, tokens).tokens == 688, "others' ends are not c's"
    made.settle("c")
    assert hit(made, keys, tokens).furthest == 0


def test_nothing_is_expected_of_a_replica_that_restarted_or_is_not_trusted() -> None:
    made = index("r")
    tokens, keys = prompt(700, 0)
    made.book("r", "a", tokens, keys, NO_HIT)
    made.apply("r", 2, 0, [], RULE)
    assert hit(made, keys, tokens).furthest == 0
    made.reached("r", 2, 5)
    made.book("r", "b", tokens, keys, NO_HIT)
    made.replay_ended("r", 2, 1)
    for sequence in range(1, 5):
        made.apply("r", 2, sequence, [])
    assert made.trusted("r")
    assert hit(made, keys, tokens).furthest == 0
    made.book("unknown", "c", tokens, keys, NO_HIT)
    made.settle("c")


def test_what_a_pass_costs_is_part_of_the_rule() -> None:
    tokens, keys = prompt(700, 0)
    expected = {
        1: {SYSTEM, 688},
        256: {SYSTEM, 688},
        688 - SYSTEM: {SYSTEM, 688},
        689 - SYSTEM: {SYSTEM},
        4000: {SYSTEM},
    }
    for cost, lengths in expected.items():
        told = HitRule.from_dict(json.loads(json.dumps(replace(RULE, pass_tokens=cost).to_dict())))
        assert told.pass_tokens == cost
        states = stored_by(told, tokens, keys, NO_HIT, SharedPrefixes())[2]
        assert {(keys.index(key) + 1) * 16 for key in states} == lengths
    older = RULE.to_dict()
    del older["pass_tokens"]
    assert HitRule.from_dict(older) == RULE, "engines that do not tell take 256"
    for wrong in (0, -1, None, "many"):
        with pytest.raises(ValueError, match=r"pass_tokens|no hit rule|invalid literal"):
            HitRule.from_dict(RULE.to_dict() | {"pass_tokens": wrong})


def test_expected_equals_stored() -> None:
    """A prompt behind any mixture of others finds the same whether they are on their way or stored."""
    rng = random.Random(5)
    for _ in range(100):
        coming, there, shared = index("r"), index("r"), SharedPrefixes()
        for number in range(4):
            tokens, keys = prompt(rng.randrange(SYSTEM, 1200), rng.randrange(3))
            found = hit(coming, keys, tokens)
            assert found == hit(there, keys, tokens)
            if found.furthest > found.tokens:
                shared.learn(keys[found.furthest // 16 - 1])
            coming.book("r", str(number), tokens, keys, found)
            there.apply("r", 1, number + 1, stored(stored_by(RULE, tokens, keys, found, shared)))


def booked(made: BlockIndex, request: str, length: int, seed: int) -> Hit:
    tokens, keys = prompt(length, seed)
    found = hit(made, keys, tokens)
    made.book("r", request, tokens, keys, found)
    return found


def test_where_requests_part_is_known_from_the_engine_and_guessed_meanwhile() -> None:
    """A router that came late, or beside others, has not seen the requests that taught the engine."""
    tokens, keys = prompt(1200, 0)
    other = tokens[:640] + [7] * 500, keys[:40] + [9000 + i for i in range(31)]
    for told in (False, True):
        made = index("r")
        events = [JunctionsLearned([keys[39]])] if told else []
        made.apply("r", 1, 1, events)
        booked(made, "a", 1200, 0)
        assert hit(made, other[1], other[0]).tokens == (640 if told else SYSTEM), "a state is kept where others part"

    made = index("r")
    booked(made, "a", 1200, 0)
    junctions = made._replicas["r"].junctions
    found = hit(made, other[1], other[0])
    assert found.furthest == 640
    made.book("r", "b", *other, found)
    assert keys[39] in junctions, "b will teach the engine"
    made.book("r", "c", *other, found)
    made.settle("b")
    assert keys[39] in junctions, "or c"
    made.settle("c")
    assert keys[39] not in junctions, "the engine has not told of it"
    made.book("r", "d", *other, found)
    made.apply("r", 1, 1, [JunctionsLearned([keys[39]])])
    made.settle("d")
    assert keys[39] in junctions
    assert made.contents("r").junctions == (keys[39],)
    made.apply("r", 2, 0, [], RULE)
    assert made.contents("r").junctions == (), "another engine process has to learn anew"


def test_junctions_travel_in_headers_and_snapshots() -> None:
    header = {"type": "BlockRemoved", "block_hashes": [], "medium": None, "stream": {"epoch": 1, "junctions": [5, 6]}}
    batch = decode(msgspec.msgpack.encode([0.0, [header], 0]))
    assert batch.events == [JunctionsLearned([5, 6])]
    snapshot = Snapshot.of(1, 3, RULE, [[], [], []], [5, b"\0" * 31 + b"\7"])
    assert Snapshot.from_dict(snapshot.to_dict()) == snapshot
    assert snapshot.junctions == (5, 7)
    made = index("r")
    made.load("r", snapshot)
    assert made.contents("r").junctions == (5, 7)
    assert list(Junctions([1, 2])) == [1, 2]


def test_a_prompt_is_computed_when_its_last_page_is_stored() -> None:
    made = index("r")
    tokens, keys = prompt(700, 0)
    assert booked(made, "a", 700, 0).tokens == 0
    booked(made, "ended", 700, 0)
    made.settle("ended")
    made.apply("r", 1, 1, [BlockStored(keys[:40], 0)])
    assert made.take_computed() == [], "a chunk"
    made.apply("r", 1, 2, [BlockStored(keys[40:], 1)])
    assert made.take_computed() == [], "of windows alone"
    made.apply("r", 1, 3, [BlockStored(keys[40:], 0)])
    assert made.take_computed() == ["a"]
    assert made.take_computed() == []
    made.settle("a")
    assert hit(made, keys, tokens).furthest == 688


def test_a_prompt_is_computed_although_an_equal_one_was_given_up() -> None:
    made = index("r")
    keys = prompt(500, 0)[1]
    assert booked(made, "a", 500, 0).tokens == 0
    assert booked(made, "b", 500, 0).tokens == SYSTEM, "it computes the rest again, and counts as the last to store it"
    made.apply("r", 1, 1, [BlockStored(keys[:20], group) for group in range(3)])
    made.settle("b")
    made.apply("r", 1, 2, [BlockStored(keys[20:], group) for group in (1, 0)])
    assert made.take_computed() == ["a"]


def test_what_another_replica_stores_is_no_sign_that_a_prompt_is_computed() -> None:
    made = index("r")
    keys = prompt(700, 0)[1]
    booked(made, "a", 700, 0)
    made.apply("r", 1, 1, [AllBlocksCleared()])
    while made.sweep(1000):
        pass
    made.apply("s", 1, 0, [], RULE)
    made.book("s", "b", *prompt(700, 1), NO_HIT)
    made.apply("s", 1, 1, [BlockStored(keys, 0)])  # in lanes that were r's
    assert made.take_computed() == []
    made.settle("a")
