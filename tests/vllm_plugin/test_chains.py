"""Cached pages that no hit can get to are freed, all of them and no others; told by plain hash chains."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
    resolve_block_hashes,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
from vllm.v1.request import Request

from jenga.allocator import EVICTION_CAUSES, PageState
from jenga.vllm_plugin.pool import GroupPool
from tests.vllm_plugin.test_steady_steps import LONGEST, MODELS, PAGE, Running, Twins, full, installed, state, window

__all__ = ["installed"]  # a fixture, used by being known here

UNREACHABLE, FORGOTTEN = EVICTION_CAUSES.index("unreachable"), EVICTION_CAUSES.index("forgotten")
TWO_DENSE = "two of full attention"


class Watched(Twins):
    """Twins whose first manager is compared with what hash chains say; now and then a page is evicted by name."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        super().__init__(name, monkeypatch, True, seed)
        self.coordinator = self.managers[0].coordinator
        self.specs = MODELS[name]
        self.before: dict[bytes, list[bytes]] = {}
        """Names of all pages of full attention that a page stands behind."""
        self.told_of: list[Counter[Any]] = [Counter() for _ in self.specs]
        self.dropped = self.dropped_held = 0
        for m in self.managers:
            m.block_pool.enable_kv_cache_events = True
            for pool in m.coordinator.pools:
                pool.enable_kv_cache_events = True
        uncache = GroupPool.uncache

        def checked(pool: GroupPool, block: Any, cause: str = "evicted") -> None:
            if cause == "unreachable" and pool in self.coordinator.pools:
                self.learn()
                assert not self.reachable(block.block_hash), "a hit could get to it"
                self.dropped += 1
                self.dropped_held += block.ref_cnt > 0
            uncache(pool, block, cause)

        monkeypatch.setattr(GroupPool, "uncache", checked)

    def copies(self, node: Any) -> list[Any]:
        pool = self.coordinator.pools[get_group_id(node)]
        names = pool.cached_block_hashes_by_block  # further ones
        return [b for b in pool.blocks if b.block_hash == node or node in names.get(b.block_id, ())]

    def cached(self, node: Any) -> bool:
        return node in self.coordinator.pools[get_group_id(node)].names

    def reachable(self, node: Any) -> bool:
        return all(map(self.cached, self.before[node]))

    def learn(self) -> None:
        """Name the pages of every request there was: their prefixes, whatever became of them."""
        for entry in (*self.running, *self.waiting):
            request: Request = entry.requests[0]
            chain = []
            for group, spec in enumerate(self.specs):
                hashes = resolve_block_hashes(request.block_hashes, PAGE, spec.block_size)
                for i in range(len(request.block_hashes) * PAGE // spec.block_size):
                    name = make_block_hash_with_group_id(hashes[i], group)
                    dense = isinstance(spec, FullAttentionSpec)
                    chain.append(((i + 1) * spec.block_size, 0 if dense else 1, group, name))
                if isinstance(spec, FullAttentionSpec):  # tails shorter than a page have names too
                    for i in range(len(request.block_hashes)):
                        name = make_block_hash_with_group_id(request.block_hashes[i], group)
                        if (i + 1) * PAGE % spec.block_size:
                            chain.append(((i + 1) * PAGE, 1, group, name))
            chain.sort()
            passed: list[bytes] = []
            for _, behind, _, name in chain:
                self.before.setdefault(name, list(passed))
                if not behind:
                    passed.append(name)

    def compare(self) -> None:
        for m in self.managers:
            m.coordinator.sweep()  # as at the end of every step of the scheduler
        super().compare()
        self.learn()
        free = self.coordinator.allocator
        for group, pool in enumerate(self.coordinator.pools):
            names: Counter[Any] = Counter()
            for block in pool.blocks[1:]:
                name = block.block_hash
                if name is not None:
                    names[name] += 1
                    assert block.ref_cnt or self.reachable(name), f"group {group} page {block.block_id} cannot be hit"
                    assert self.cached(name)
                    assert (free.state(group, block.block_id) is PageState.CACHED) == (block.ref_cnt == 0)
            assert set(names) <= set(pool.names)
            self.told_of[group] += Counter()
        self.read_events()
        for group, pool in enumerate(self.coordinator.pools):
            there: Counter[Any] = Counter()
            for name in pool.names:
                there[maybe_convert_block_hash(get_block_hash(name))] += len(
                    pool.cached_block_hash_to_block.copies(name)
                )
            assert +self.told_of[group] == there, f"group {group}: events tell something else"
        assert sum(causes[UNREACHABLE] for causes in free.counters().evicted_by_cause) == self.dropped

    def read_events(self) -> None:
        for event in self.managers[0].take_events():
            if isinstance(event, BlockStored):
                self.told_of[event.group_idx].update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.told_of[event.group_idx].subtract(event.block_hashes)
                assert min(self.told_of[event.group_idx].values(), default=0) >= 0
            elif isinstance(event, AllBlocksCleared):
                self.told_of = [Counter() for _ in self.told_of]
        self.managers[1].take_events()

    def evict_some(self) -> None:
        """Pages of any place in their prefixes, as no allocation would choose them."""
        group = self.random.randrange(len(self.specs))
        pages = [b.block_id for b in self.coordinator.pools[group].blocks if b.block_hash is not None and not b.ref_cnt]
        if pages:
            chosen = set(self.random.sample(pages, min(len(pages), 3)))
            for m in self.managers:
                m.coordinator.pools[group].evict_blocks(chosen)
                m.coordinator.sweep()

    def reset(self) -> None:
        for entry in list(self.running):
            self.preempt(entry)
        for m in self.managers:
            assert m.reset_prefix_cache()
        assert not len(self.coordinator.chains)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, TWO_DENSE, [full(), full(2 * PAGE), state(), window(18)])


@pytest.mark.parametrize("name", [*MODELS, TWO_DENSE])
def test_what_is_cached_can_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = hits = 0
    for seed in range(6):
        watched = Watched(name, monkeypatch, seed)
        for turn in range(12):
            watched.play(steps=15)
            if seed >= 3:
                watched.evict_some()
                watched.compare()
            if seed == 5 and turn == 6:
                watched.reset()
                watched.compare()
        dropped += watched.dropped
        hits += watched.hits
        assert not watched.dropped_held, "what a running request holds can always be reached"
        assert (watched.coordinator.chains.spine is None) is (name in (TWO_DENSE, "other pages"))
    assert dropped > 20
    assert hits > 0


class Bursts(Watched):
    """Several equal prompts at once, computed side by side: many pages are copies, and rows of pages mix them."""

    def arrive(self) -> None:
        family, tail = self.random.choice(self.families), self.tokens(self.random.randint(1, 30))
        for _ in range(self.random.randint(1, 4)):
            self.count += 1
            prompt = family[: self.random.choice((48, 48, 40, 24))] + tail[: self.random.choice((1, 9, 30))]
            first, second = (
                Request(str(self.count), prompt, SamplingParams(max_tokens=LONGEST), None, block_hasher=self.hasher)
                for _ in self.managers
            )
            self.waiting.append(Running((first, second), len(prompt) + self.random.randint(1, 25)))

    def admit(self) -> None:
        while self.waiting and len(self.running) < 5 and self.schedule(self.waiting[0], first=True):
            self.running.append(self.waiting.pop(0))

    def free(self, entry: Running) -> None:
        self.learn()
        super().free(entry)


@pytest.mark.parametrize(
    ("name", "seed", "by_name"),
    [("states", 11, False), ("states", 10, True), ("windows", 12, True), ("parts", 42, False)],
)
def test_where_many_pages_are_copies(name: str, seed: int, by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bursts = Bursts(name, monkeypatch, seed)
    bursts.managers[1].coordinator._steady = True
    for _ in range(15):
        bursts.play(steps=15)
        if by_name:
            bursts.evict_some()
            bursts.compare()
    assert bursts.dropped > 0
    assert not bursts.dropped_held


def test_states_tell_why_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched("states", monkeypatch, seed=0)
    for _ in range(20):
        watched.play(steps=20)
        watched.evict_some()
    for group, spec in enumerate(MODELS["states"]):
        causes = watched.coordinator.allocator.counters().evicted_by_cause[group]
        if isinstance(spec, MambaSpec):
            index = watched.coordinator.pools[group].cached_block_hash_to_block
            assert index.dropped["unreachable"] == causes[UNREACHABLE] > 0
            assert index.kept == sum(len(index.copies(name)) for name in index.names)
