"""A thousand abused requests to the deployment that test_serve.py then uses; `make test-hostile` makes ten thousand."""

import asyncio
import random
from typing import Any

import psutil
import pytest

from benchmarks import hostile
from benchmarks.soak import processes
from tests.e2e.test_serve import Running, jenga

pytestmark = pytest.mark.timeout(600)

# How many of each family; what takes its time comes beside the rest.
SHARES = {
    "wrong fields": 250,
    "random bytes": 120,
    "depth and number": 60,
    "oversized": 16,
    "headers": 80,
    "forms": 30,
    "wrong keys": 30,
    "hang up": 60,
}
GROWTH_MIB = 250
"""What a process may grow: one leak of the kind that was found here was three times as much."""


async def abuse(served: Running, spec: dict[str, Any], schema: list[hostile.Abuse]) -> list[hostile.Outcome]:
    """Everything, mixed."""
    place = ("127.0.0.1", served.record.port)
    families = hostile.Families(spec, seed=1, key=None)
    mixed = [*schema, *(make() for name, make in families.all().items() for _ in range(SHARES[name]))]
    random.Random(2).shuffle(mixed)
    slow = [families.slow_head() for _ in range(20)] + [families.slow_reader() for _ in range(5)]
    nowhere = hostile.request("/v1/completions", hostile.completion(model="nope"))
    found = await asyncio.gather(
        hostile.commit_all(place, mixed, 16),
        hostile.commit_all(place, slow, len(slow)),
    )
    found.append(await hostile.commit_all(place, [families.flood(None) for _ in range(200)], 200))
    found.append(await hostile.commit_all(place, [hostile.Abuse([nowhere])] * 500, 500))
    return [outcome for outcomes in found for outcome in outcomes]


def test_abuse_breaks_nothing_leaks_nothing_and_others_are_answered(served: Running) -> None:
    with served.http as http:
        spec = http.get("/openapi.json").json()
    schema = hostile.from_schema(spec, 60, seed=1, key=None)
    before = {p.pid: p.memory_info().rss for members in processes(served.record).values() for p in members}
    with hostile.well_behaved(served.record.url, None) as answers:
        outcomes = asyncio.run(abuse(served, spec, schema))
    faults = [outcome.fault for outcome in outcomes if outcome.fault]
    assert faults == []
    statuses = {outcome.status for outcome in outcomes}
    assert {"200", "400", "404", "408", "431"} <= statuses
    assert len(answers.rows) > 5
    assert [row for row in answers.rows if row[3]] == [], "the well-behaved client's own answers"
    left = hostile.nothing_held(served.record, None)
    assert left == {"replicas": 2, "pages": 0, "requests": 0}
    after = processes(served.record)
    for kind in ("proxy", "ingress", "replica", "engine core"):
        for process in after[kind]:
            assert process.pid in before, f"a process of kind '{kind}' died and was replaced"
            grown = (process.memory_info().rss - before[process.pid]) / 2**20
            assert grown < GROWTH_MIB, (kind, grown)
    assert jenga(served.state, "status").returncode == 0
    assert psutil.Process(served.record.supervisor.pid).num_fds() < 100, "no connection is left in the forwarder"
