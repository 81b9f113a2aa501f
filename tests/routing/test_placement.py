"""Placement by cost: hand-worked cases, and what may never happen."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from jenga.routing.placement import Ledger, Prices, State, costs, rank

PRICES = Prices(request=32, pressure=1, slack=16)


def best(prompt: int, hits: dict[str, int], states: dict[str, State], ledger: Ledger[str]) -> str:
    return rank(costs(prompt, hits, states, ledger, PRICES), states, PRICES, random.Random(1))[0]


def test_costs_by_hand() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.add("b", "r1", 300)
    states = {"a": State(queue=2), "b": State(), "c": State(used=0.9), "d": State(used=1.0)}
    assert costs(1000, {"a": 600, "d": 900}, states, ledger, PRICES) == {
        "a": 400 + 64,
        "b": 1000 + 300,
        "c": 1000 * 1.5,
        "d": 100 * 2,
    }


def test_a_hot_prefix_spreads_when_its_replica_is_busy() -> None:
    ledger: Ledger[str] = Ledger()
    states = {"hot": State(), "cold": State()}
    hits = {"hot": 960}
    sent = []
    for request in range(40):
        chosen = best(1000, hits, states, ledger)
        ledger.add(chosen, str(request), 1000 - hits.get(chosen, 0))
        states[chosen] = State(queue=states[chosen].queue + 1)
        hits.setdefault(chosen, 960)  # it has computed the prefix: now both have it
        sent.append(chosen)
    first_cold = sent.index("cold")
    assert 5 < first_cold < 20, "not before the queue costs more than the prefix, but then"
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
    model: dict[tuple[str, str], int] = {}
    for replica, request, tokens, adds in steps:
        if adds:
            ledger.add(replica, request, tokens)
            model[replica, request] = tokens
        else:
            ledger.settle(replica, request)
            model.pop((replica, request), None)
        for r in "abc":
            assert ledger.owed(r) == sum(n for (of, _), n in model.items() if of == r)
    ledger.keep({"a": None})
    assert [ledger.owed(r) for r in "bc"] == [0, 0]
    assert ledger.owed("a") == sum(n for (of, _), n in model.items() if of == "a")
