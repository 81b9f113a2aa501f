"""Who is next at the ingress: bounded turns, and the same time for every client that wants it."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.turns import Turn, Turns


class Clock:
    """A time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def come(*turns: Turn) -> list[bool]:
    return [turn.granted.done() for turn in turns]


@pytest.mark.asyncio
async def test_a_flood_of_one_does_not_stand_before_another() -> None:
    turns = Turns(2)
    flood = [turns.queue("evil") for _ in range(1000)]
    assert sum(come(*flood)) == 2
    good = turns.queue("good")
    assert come(good) == [False]
    turns.end(flood[0])
    assert come(good) == [True], "the first place that is free"
    turns.end(flood[1])
    turns.end(flood[1])
    assert sum(come(*flood)) == 3, "an end counts once"
    for turn in (*flood, good):
        turns.end(turn)
    assert sum(come(*[turns.queue("anybody") for _ in range(3)])) == 2, "nothing is left of them"


@pytest.mark.asyncio
async def test_costs_are_measured_and_shared_evenly() -> None:
    clock = Clock()
    turns = Turns(1, clock)
    cost = {"dear": 0.2, "cheap": 0.01}
    waiting = {turn: who for who in cost for turn in [turns.queue(who) for _ in range(300)]}
    served: Counter[str] = Counter()
    for _ in range(210):
        (turn,) = [turn for turn in waiting if turn.granted.done()]
        who = waiting.pop(turn)
        served[who] += 1
        clock.now += cost[who]
        turns.end(turn)
    assert served["dear"] == pytest.approx(10, abs=1)
    late = turns.queue("late")
    served.clear()
    while not late.granted.done():
        (turn,) = [turn for turn in waiting if turn.granted.done()]
        served[waiting.pop(turn)] += 1
        clock.now += 0.01
        turns.end(turn)
    assert served.total() <= 2, "who comes later waits for the turn that runs, at most for one more"
    for _ in range(3):
        again = turns.queue("late")
        clock.now += 0.2
        turns.end(late)
        late = again
    assert not late.granted.done(), "and has no claim to the time in which it was away"


@pytest.mark.asyncio
async def test_large_ones_leave_room_for_small_ones() -> None:
    turns = Turns(4)
    large = [turns.queue("evil", large=True) for _ in range(3)]
    small = [turns.queue(who) for who in ("evil", "good", "good")]
    assert come(*large, *small) == [True, False, False, True, True, True]
    turns.end(small[0])
    assert come(*large) == [True, False, False]
    turns.end(large[0])
    assert come(*large) == [True, True, False]
    turns.end(large[2])
    turns.end(large[1])
    assert large[2].granted.cancelled(), "gave up waiting"
    turns.at_once = 8
    assert sum(come(*[turns.queue("evil", large=True) for _ in range(3)])) == 2


@pytest.mark.asyncio
async def test_a_large_one_is_not_passed_by_small_ones_of_its_own_line_for_ever() -> None:
    turns = Turns(2)
    first = [turns.queue("all", large=True), turns.queue("all")]
    large = turns.queue("all", large=True)
    later = [turns.queue("all") for _ in range(5)]
    turns.end(first[1])
    assert come(large, *later) == [False, True, False, False, False, False], "no room for a second large one"
    turns.end(first[0])
    assert come(large, *later) == [True, True, False, False, False, False]


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.booleans()) | st.tuples(st.just("end"), st.integers(0, 1000)), max_size=60
)


@given(STEPS, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_no_place_is_lost_or_given_twice(steps: list[tuple[str, int]], at_once: int) -> None:
    async def play() -> None:
        turns, open_ = Turns(at_once), list[Turn]()
        for what, which in steps:
            if what != "end":
                open_.append(turns.queue(what, large=bool(which)))
            elif open_:
                turns.end(open_.pop(which % len(open_)))
            running = [turn for turn in open_ if turn.granted.done()]
            large = sum(turn.large for turn in running)
            assert len(running) <= at_once
            assert large <= max(1, at_once // 4)
            waiting = [turn for turn in open_ if not turn.granted.done()]
            if len(running) < at_once:
                assert all(turn.large for turn in waiting)
                assert not waiting or large == max(1, at_once // 4)

    asyncio.run(play())
