"""The cache-aware router itself, with replicas that only have names."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from vllm.v1.core import kv_cache_utils

from deployments import keys
from deployments.cache_router import CacheAwareRouter
from jenga.policies import FullAttention
from jenga.routing import BlockIndex, GroupRule, HitRule
from jenga.routing.events import Snapshot
from jenga.routing.slow_start import SlowStart

DEPLOYMENT = DeploymentID("engine", "app")


@pytest.fixture
def router() -> CacheAwareRouter:
    kv_cache_utils.init_none_hash(keys.hash_function("sha256"))
    rule = HitRule((GroupRule("full", FullAttention(), 32),), 32, 32, kv_cache_utils.NONE_HASH.hex())
    made = CacheAwareRouter(DEPLOYMENT, DeploymentHandleSource.UNKNOWN)
    made.initialize_state()
    for name in ("one", "two"):
        made._feed.index.apply(name, 1, 0, [], rule)
    return made


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT), routing_stats={})


REPLICAS = [replica("one"), replica("two")]


class Asked:
    """A request as Ray hands it to routers."""

    def __init__(self, name: str, tokens: list[int] | None, adapter: str = "") -> None:
        self.body = SimpleNamespace(kv_transfer_params=tokens and {keys.TOKEN_IDS: tokens}, cache_salt=None)
        self.args = [self.body]
        self.metadata = SimpleNamespace(internal_request_id=name, multiplexed_model_id=adapter)
        self.routing_context = SimpleNamespace(should_backoff=False)

    def placed(self, router: CacheAwareRouter) -> ReplicaID:
        ranks = asyncio.run(router.choose_replicas(REPLICAS, self))  # type: ignore[arg-type]
        assert len(ranks[-1]) == 2, "the last rank is everybody"
        return ranks[0][0].replica_id

    @property
    def promised(self) -> dict[str, int]:
        return self.body.kv_transfer_params[keys.PREDICTED]


def test_a_request_placed_a_moment_ago_counts_before_it_is_sent(router: CacheAwareRouter) -> None:
    tokens = list(range(1000))
    first = Asked("first", tokens)
    place = first.placed(router)
    assert first.promised == {"one": 0, "two": 0}
    second = Asked("second", tokens[:600] + [7] * 100)
    second.placed(router)
    assert second.promised[place.unique_id] == 576
    assert router._ledger.owed(place) >= 1000


def test_what_ray_sends_elsewhere_is_booked_there(router: CacheAwareRouter) -> None:
    tokens = list(range(1000))
    first = Asked("first", tokens)
    place = first.placed(router)
    other = next(r.replica_id for r in REPLICAS if r.replica_id != place)
    router.on_request_routed(first, other, None)  # type: ignore[arg-type]
    assert (router._ledger.owed(place), router._ledger.owed(other)) == (0, 1000)
    second = Asked("second", tokens)
    second.placed(router)
    assert second.promised == {place.unique_id: 0, other.unique_id: 992}
    router.on_request_completed(other, "first")
    router.on_request_completed(router._booked["second"].replica, "second")
    third = Asked("third", tokens)
    third.placed(router)
    assert third.promised == {"one": 0, "two": 0}, "what has not been stored by its end does not come"
    assert router._ledger.owed(other) + router._ledger.owed(place) == 1000


def test_a_request_that_its_client_gave_up_is_forgotten(
    router: CacheAwareRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    Asked("first", list(range(1000))).placed(router)
    monkeypatch.setattr("deployments.cache_router._GIVEN_UP_S", -1.0)
    Asked("second", [5] * 64).placed(router)
    assert sum(router._ledger.owed(r.replica_id) for r in REPLICAS) == 64
    assert list(router._booked) == ["second"]


def test_replicas_that_name_blocks_otherwise_are_asked_in_their_own_terms(router: CacheAwareRouter) -> None:
    """As while an update with another block size rolls out."""
    rule = HitRule((GroupRule("full", FullAttention(), 16),), 16, 16, kv_cache_utils.NONE_HASH.hex())
    tokens = list(range(1000))
    index = router._feed.index
    index.forget("two")
    index.apply("two", 2, 0, [], rule)
    hash_function = keys.hash_function("sha256")
    for name, blocks in (("one", 3), ("two", 5)):
        known = index.rule(name)
        assert known is not None
        names = keys.block_keys(tokens, known, hash_function, None)[:blocks]
        index.load(name, Snapshot.of(index.epoch(name) or 0, 1, known, [names]))
    asked = Asked("first", tokens)
    place = asked.placed(router)
    assert asked.promised == {"one": 96, "two": 80}
    second = Asked("second", tokens)
    second.placed(router)
    full = {"one": 992, "two": 992}
    assert second.promised[place.unique_id] == full[place.unique_id], "what is booked is named in the replica's terms"


def test_a_broken_index_leaves_placement_by_load(router: CacheAwareRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(BlockIndex, "hits", broken)
    asked = Asked("first", list(range(100)))
    asked.placed(router)
    assert keys.PREDICTED not in asked.body.kv_transfer_params
    assert not router._booked


@pytest.mark.parametrize("known", [True, False])
def test_a_new_replica_is_not_given_everything_at_once(router: CacheAwareRouter, known: bool) -> None:
    """By cost and by load alone: its cache is as empty as the other's, and its queue is the shortest."""
    router._slow_start = SlowStart(30)
    router._slow_start.keep([REPLICAS[0].replica_id])
    router._slow_start.keep(each.replica_id for each in REPLICAS)
    router._replica_queue_len_cache.update(REPLICAS[0].replica_id, 20)
    sent = [Asked(str(n), [n] * 64 if known else None).placed(router).unique_id for n in range(3)]
    if known:  # placed, though Ray has not sent it yet
        assert sent == ["two", "one", "one"]
    else:
        router._replica_queue_len_cache.update(REPLICAS[1].replica_id, 1)
        sent.append(Asked("last", None).placed(router).unique_id)
        assert sent == ["two", "two", "two", "one"]


def test_what_an_adapter_computed_is_nobody_elses(router: CacheAwareRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(router._metrics, "fallback", told.append)
    tokens = list(range(1000))
    adapted = Asked("adapted", tokens, adapter="model:adapter")
    adapted.placed(router)
    assert told == ["adapter"]
    assert keys.PREDICTED not in adapted.body.kv_transfer_params
    plain = Asked("plain", tokens)
    plain.placed(router)
    assert plain.promised == {"one": 0, "two": 0}
    assert told == ["adapter"]
