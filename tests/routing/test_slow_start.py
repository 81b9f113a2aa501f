"""New replicas take load gradually, and nobody is ever left without a replica."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jenga.routing.slow_start import SlowStart


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_new_replica_gets_the_part_of_the_usual_load_that_its_age_is_of_the_window() -> None:
    clock = Clock()
    slow = SlowStart[str](30, clock)
    slow.keep(["a", "b"])
    assert slow.open({"a": 40, "b": 20}) == ["a", "b"], "met first: not new"
    slow.keep(["a", "b", "new"])
    for age, most in ((0, 1), (1, 1), (5, 5), (15, 15), (29, 29)):
        clock.now = 1000.0 + age
        assert "new" in slow.open({"a": 40, "b": 20, "new": most - 1})
        assert slow.open({"a": 40, "b": 20, "new": most}) == ["a", "b"]
    clock.now = 1030.0
    assert slow.open({"a": 40, "b": 20, "new": 1000}) == ["a", "b", "new"]


def test_who_comes_back_is_new_again_and_the_only_ones_never_are() -> None:
    clock = Clock()
    slow = SlowStart[str](30, clock)
    slow.keep(["a", "b"])
    slow.keep(["a"])
    slow.keep(["a", "b"])
    assert slow.open({"a": 0, "b": 1}) == ["a"]
    slow.keep(["b"])
    assert slow.open({"b": 9}) == ["b"], "without others there is no usual load"
    assert SlowStart[str](0, clock).open({"never met": 9}) == ["never met"]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(0, 30),
)
def test_some_replica_is_always_open_and_the_rest_are_new(steps: list[tuple[int, bool, int]], window: int) -> None:
    clock = Clock()
    slow = SlowStart[int](window, clock)
    there: dict[int, int] = {}
    arrived: dict[int, float] = {}
    for number, (pause, leave, queue) in enumerate(steps):
        clock.now += pause
        if leave and there:
            there.pop(next(iter(there)))
        else:
            there[number], arrived[number] = queue, clock.now
        slow.keep(there)
        taking = slow.open(there)
        assert bool(taking) == bool(there)
        assert all(clock.now - arrived[replica] < window and there[replica] for replica in there.keys() - set(taking))
