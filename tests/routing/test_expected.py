"""Requests on their way: what they will store counts before the engine tells of it, and never longer than that."""

from __future__ import annotations

import random

from jenga.checkpoints import SharedPrefixes
from jenga.hits import Hit
from jenga.policies import FullAttention, RecurrentState, SlidingWindow
from jenga.routing import BlockIndex, GroupRule, HitRule
from jenga.routing.events import BlockRemoved, BlockStored
from jenga.routing.expected import stored_by

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
    pages = stored_by(RULE, tokens, keys, Hit(0, 0, None), SharedPrefixes())
    made.expect("r", "a", pages)
    other, names = prompt(800, 1)
    assert hit(made, names, other).tokens == SYSTEM, "the turn's start is where the engine keeps a state"
    assert hit(made, keys, tokens).tokens == 688, "and the prompt's end"
    assert hit(made, names, other, "other").tokens == 0
    made.settle("a")
    made.settle("a")
    assert hit(made, keys, tokens).tokens == 0


def test_what_has_arrived_lives_and_dies_by_events() -> None:
    made = index("r")
    tokens, keys = prompt(700, 0)
    pages = stored_by(RULE, tokens, keys, Hit(0, 0, None), SharedPrefixes())
    for request in ("a", "b"):
        made.expect("r", request, pages)
    made.apply("r", 1, 1, stored(pages))
    assert hit(made, keys, tokens).tokens == 688
    gone = [BlockRemoved(names, group) for group, names in enumerate(pages)]
    made.apply("r", 1, 2, gone)
    assert hit(made, keys, tokens).tokens == 0, "evicted while both requests still run"
    made.expect("r", "c", pages)
    made.settle("a")
    made.settle("b")
    assert hit(made, keys, tokens).tokens == 688, "others' ends are not c's"
    made.settle("c")
    assert hit(made, keys, tokens).tokens == 0


def test_nothing_is_expected_of_a_replica_that_restarted_or_is_not_trusted() -> None:
    made = index("r")
    tokens, keys = prompt(700, 0)
    pages = stored_by(RULE, tokens, keys, Hit(0, 0, None), SharedPrefixes())
    made.expect("r", "a", pages)
    made.apply("r", 2, 0, [], RULE)
    assert hit(made, keys, tokens).tokens == 0
    made.reached("r", 2, 5)
    made.expect("r", "b", pages)
    made.replay_ended("r", 2, 1)
    for sequence in range(1, 5):
        made.apply("r", 2, sequence, [])
    assert made.trusted("r")
    assert hit(made, keys, tokens).tokens == 0
    made.expect("unknown", "c", pages)
    made.settle("c")


def test_expected_equals_stored() -> None:
    """A prompt behind any mixture of others finds the same whether they are on their way or stored."""
    rng = random.Random(5)
    for _ in range(100):
        coming, there, shared = index("r"), index("r"), SharedPrefixes()
        for number in range(4):
            tokens, keys = prompt(rng.randrange(SYSTEM, 1200), rng.randrange(3))
            found = hit(coming, keys, tokens)
            assert found == hit(there, keys, tokens)
            pages = stored_by(RULE, tokens, keys, found, shared)
            coming.expect("r", str(number), pages)
            there.apply("r", 1, number + 1, stored(pages))
