"""Who is served first by an engine that many wait for."""

from deployments.order import SPACING_MS, Order


class Clock:
    """A time that passes when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_single_request_passes_a_flood_but_nobody_for_ever() -> None:
    clock = Clock()
    order = Order(clock)
    flood = [order.next("evil", running) for running in range(100)]
    assert flood == sorted(flood)
    clock.now += 0.01
    single = order.next("good", 0)
    assert flood[0] < single < flood[1]
    assert single == Order(clock).next("good", 0), "another ingress would say the same"
    clock.now += 100 * SPACING_MS / 1000
    assert order.next("other", 0) > flood[-1], "whoever comes later than that does not pass it"


def test_one_tenants_requests_stay_in_their_order() -> None:
    clock = Clock()
    order = Order(clock)
    waits = [order.next("a", running) for running in range(50)][-1]
    clock.now += 1
    assert order.next("a", 3) == waits, "many have ended meanwhile"
    order.forget("a")
    assert order.next("a", 0) < waits, "and when all have, it is as if it had never been"
