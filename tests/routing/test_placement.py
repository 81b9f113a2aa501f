"""Placement by cost: hand-worked cases, and what may never happen."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jenga.hits import Hit
from jenga.routing.placement import NOTHING, Ledger, Prices, State, costs, rank

PRICES = Prices(request=32, compute=1, behind=0, pressure=1, store=0.5, slack=16)


def found(tokens: int, furthest: int | None = None) -> Hit:
    return Hit(tokens, tokens if furthest is None else furthest, None)


def best(prompt: int, hits: dict[str, Hit], states: dict[str, State], ledger: Ledger[str]) -> str:
    return rank(costs(prompt, hits, states, ledger, PRICES), states, PRICES, random.Random(1))[0]


def test_costs_by_hand() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.add("b", "r1", 300)
    ledger.add("a", "r0", 100)
    ledger.settle("r0")  # done, but stored: as a third of b's, of the mean of 100 as 1
    states = {"a": State(queue=2), "b": State(), "c": State(used=0.9), "d": State(used=1.0)}
    assert costs(1000, {"a": found(600), "d": found(900)}, states, ledger, PRICES) == pytest.approx(
        {"a": 400 + 200 + 64, "b": 1000 + 3 * 500 + 300, "c": 1000 * 1.5, "d": 100 * 2}
    )


def test_what_is_stored_already_counts_even_where_it_cannot_be_resumed() -> None:
    """There the missing state is left for the next request, and no second copy of the rest is stored."""
    states = {"neither": State(), "pages": State(), "both": State()}
    hits = {"pages": found(0, 800), "both": found(800)}
    ledger: Ledger[str] = Ledger()
    assert best(1000, hits, states, ledger) == "both"
    ledger.add("both", "r", 1000)
    assert best(1000, hits, states, ledger) == "pages"
    ledger.add("pages", "s", 500)
    ledger.add("both", "t", 1000)
    assert best(1000, hits, states, ledger) == "neither", "but not at any price"


def test_a_hot_prefix_spreads_when_its_replica_is_busy() -> None:
    ledger: Ledger[str] = Ledger()
    states = {"hot": State(), "cold": State()}
    hits = {"hot": found(960)}
    sent = []
    for request in range(40):
        chosen = best(1000, hits, states, ledger)
        ledger.add(chosen, str(request), 1000 - hits.get(chosen, NOTHING).tokens)
        states[chosen] = State(queue=states[chosen].queue + 1)
        hits.setdefault(chosen, found(960))  # it has computed the prefix: now both have it
        sent.append(chosen)
    first_cold = sent.index("cold")
    assert 5 < first_cold < 30, "not before the queue costs more than the prefix, but then"
    assert abs(sent.count("hot") - sent.count("cold")) <= first_cold + 2


def test_equally_good_replicas_share_by_load() -> None:
    states = {"a": State(queue=0), "b": State(queue=0)}
    ledger: Ledger[str] = Ledger()
    order = {rank(costs(100, {}, states, ledger, PRICES), states, PRICES, random.Random(s))[0] for s in range(20)}
    assert order == {"a", "b"}, "ties are broken at random"
    near = {"a": State(queue=1), "b": State(queue=0)}
    cost = {"a": 100.0, "b": 110.0}
    assert rank(cost, near, PRICES, random.Random(1)) == ["b", "a"], "within the slack the shorter queue counts"


def test_nothing_to_choose_from() -> None:
    assert rank({}, {}, PRICES, random.Random(1)) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 999), st.booleans())))
def test_the_ledger_balances(steps: list[tuple[str, str, int, bool]]) -> None:
    ledger: Ledger[str] = Ledger()
    model: dict[str, tuple[str, int]] = {}
    for replica, request, tokens, adds in steps:
        if adds:
            ledger.add(replica, request, tokens)
            model[request] = replica, tokens
        else:
            ledger.settle(request)
            model.pop(request, None)
        for r in "abc":
            assert ledger.owed(r) == sum(n for of, n in model.values() if of == r)
    ledger.keep({"a": None})
    assert [ledger.owed(r) for r in "bc"] == [0, 0]
    assert ledger.owed("a") == sum(n for of, n in model.values() if of == "a")
    for request in "xyz":
        ledger.settle(request)
    assert [ledger.owed(r) for r in "abc"] == [0, 0, 0]


def test_new_prompts_go_where_little_was_stored_lately() -> None:
    ledger: Ledger[str] = Ledger()
    states = {"full": State(), "fresh": State()}
    for number in range(2000):
        ledger.add("full", str(number), 1000)
        ledger.settle(str(number))
    assert 0 < ledger.stored("full") <= 1_000_000, "what is long ago is forgotten"
    assert {best(100, {}, states, ledger) for _ in range(5)} == {"fresh"}
    ledger.keep({"fresh": None})
    assert ledger.stored("full") == 0


def test_idle_replicas_are_used_and_busy_ones_keep_to_what_they_have() -> None:
    prices = Prices(request=0, compute=1, behind=1, store=0.5)
    hits = {"has": found(1000)}
    ledger: Ledger[str] = Ledger()
    ledger.add("has", "r", 2000)

    def chosen(queue: int) -> str:
        states = {"has": State(queue=queue), "lacks": State(queue=queue)}
        return rank(costs(1000, hits, states, ledger, prices), states, prices, random.Random(1))[0]

    assert [chosen(queue) for queue in (0, 4)] == ["lacks", "has"]
