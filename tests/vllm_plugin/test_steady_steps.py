"""Steps that `Marks` lets a request skip change nothing: beside a coordinator that never skips, all books are equal."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_coordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from jenga.grouping import grouping
from jenga.vllm_plugin import parts, states, steady
from jenga.vllm_plugin.config import JengaGroupSpec, JengaKVCacheConfig
from jenga.vllm_plugin.coordinator import replacement
from jenga.vllm_plugin.groups import cut, describe
from jenga.vllm_plugin.states import StateManager, role_of

PAGE = 8
VOCABULARY, LONGEST, BATCH = 30, 200, 48
SHAPE: dict[str, Any] = {"num_kv_heads": 1, "head_size": 16, "dtype": torch.bfloat16}


def full(page: int = PAGE) -> KVCacheSpec:
    return FullAttentionSpec(block_size=page, **SHAPE)


def window(tokens: int, page: int = PAGE) -> KVCacheSpec:
    return SlidingWindowSpec(block_size=page, sliding_window=tokens, **SHAPE)


def chunked(tokens: int) -> KVCacheSpec:
    return ChunkedLocalAttentionSpec(block_size=PAGE, attention_chunk_size=tokens, **SHAPE)


def state() -> KVCacheSpec:
    return MambaSpec(block_size=PAGE, shapes=((3000,),), dtypes=(torch.int8,), mamba_cache_mode="align")


MODELS: dict[str, list[KVCacheSpec]] = {
    "windows": [full(), window(20), window(1)],
    "chunks": [full(), chunked(28), window(15)],
    "states": [full(), state(), window(18)],
    "other pages": [full(2 * PAGE), window(12), window(42, 4 * PAGE)],
    "parts": [full(), state(), window(18)],
}
PARTS = {"parts": (2, 3, 1)}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adapter and engine do once per process."""
    monkeypatch.setattr(KVCacheManager, "__init__", KVCacheManager.__init__)  # restored afterwards
    monkeypatch.setattr(EngineCore, "get_kv_cache_group_metadata", EngineCore.get_kv_cache_group_metadata)
    parts.install()
    steady.install()
    states.install()
    init_none_hash(sha256)


def manager(name: str, monkeypatch: pytest.MonkeyPatch, caching: bool, sparse: bool) -> KVCacheManager:
    specs = MODELS[name]
    counts = PARTS.get(name, (1,) * len(specs))
    groups = [
        KVCacheGroupSpec([f"layer.{i}.{part}" for part in range(count)], spec)
        for i, (spec, count) in enumerate(zip(specs, counts, strict=True))
    ]
    memory = sum(
        count * (14 * spec.page_size_bytes if isinstance(spec, MambaSpec) else 28_000 // len(specs))
        for spec, count in zip(specs, counts, strict=True)
    )
    layout = grouping(describe(groups), counts, memory).layout
    placed = [
        JengaGroupSpec(
            piece.layer_names, piece.kv_cache_spec, role=role_of(g.kv_cache_spec), layout=layout, index=i, part=part
        )
        for i, (g, count) in enumerate(zip(groups, counts, strict=True))
        for part, piece in enumerate(cut(g, count))
    ]
    placed.sort(key=lambda g: g.part > 0)
    config = JengaKVCacheConfig(
        memory // layout.large_page_bytes, [], list(placed), prefix_cache_retention_interval=0 if sparse else None
    )
    make = replacement(kv_cache_coordinator.get_kv_cache_coordinator)
    monkeypatch.setattr("vllm.v1.core.kv_cache_manager.get_kv_cache_coordinator", make)
    return KVCacheManager(
        config,
        max_model_len=LONGEST,
        scheduler_block_size=max(spec.block_size for spec in specs),
        hash_block_size=PAGE,
        max_in_flight_tokens=BATCH,
        enable_caching=caching,
    )


@dataclass
class Running:
    """One request in the two managers' eyes; each has its own `Request`, since managers write to it."""

    requests: tuple[Request, Request]
    length: int


class Twins:
    """A little scheduler over two managers: chunked prefill, steps in flight, preemption, ends, prefix hits."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, caching: bool, seed: int) -> None:
        specs = MODELS[name]
        self.random = random.Random(seed)
        sparse = seed % 2 == 0  # windows and states are kept at few lengths only
        self.managers = (manager(name, monkeypatch, caching, sparse), manager(name, monkeypatch, caching, sparse))
        self.told: dict[str, tuple[list[int], ...]] = {}  # block tables of the workers, by vLLM group
        self.aligned = any(isinstance(s, MambaSpec) for s in specs)
        self.align = max(s.block_size for s in specs)
        self.hasher = get_request_block_hasher(PAGE, sha256)
        self.families = [self.tokens(48) for _ in range(3)]
        self.running: list[Running] = []
        self.waiting: list[Running] = []
        self.count = self.preempted = self.hits = 0
        self.steps = [0, 0]
        for m in self.managers:
            assert m.coordinator._steady
            for spec, kind in zip(specs, m.coordinator.single_type_managers, strict=True):
                assert isinstance(kind, StateManager) == isinstance(spec, MambaSpec)
        self.managers[1].coordinator._steady = False
        for side in (0, 1):
            self.count_steps(side)

    def count_steps(self, side: int) -> None:
        """Count the steps that reach a coordinator."""
        coordinator = self.managers[side].coordinator
        original = coordinator.allocate_new_blocks

        def allocate_new_blocks(*args: Any) -> Any:
            self.steps[side] += 1
            return original(*args)

        coordinator.allocate_new_blocks = allocate_new_blocks

    def both(self, entry: Running) -> list[tuple[KVCacheManager, Request]]:
        return list(zip(self.managers, entry.requests, strict=True))

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(count)]

    def arrive(self) -> None:
        self.count += 1
        shared = self.random.choice(self.families)[: self.random.randint(1, 48)]
        prompt = shared + self.tokens(self.random.randint(1, 60))
        made = [
            Request(str(self.count), prompt, SamplingParams(max_tokens=LONGEST), None, block_hasher=self.hasher)
            for _ in self.managers
        ]
        self.waiting.append(Running((made[0], made[1]), len(prompt) + self.random.randint(1, 80)))

    def new_tokens(self, request: Request, computed: int) -> int:
        count = min(request.num_tokens - computed, self.random.choice((BATCH, BATCH, 9)))
        if self.aligned and computed + count < request.num_tokens:  # as the scheduler cuts chunks for states
            return max(
                (computed + count) // self.align * self.align - computed, min(self.align, request.num_tokens - computed)
            )
        return count

    def schedule(self, entry: Running, first: bool) -> bool:
        found = [m.get_computed_blocks(r) if first else (None, 0, 0) for m, r in self.both(entry)]
        hit = found[0][1]
        assert hit == found[1][1]
        count = self.new_tokens(entry.requests[0], entry.requests[0].num_computed_tokens + hit)
        if count <= 0:
            return False
        granted = [
            m.allocate_slots(r, count, hit, blocks, full_sequence_must_fit=True)
            if first
            else m.allocate_slots(r, count)
            for (m, r), (blocks, _, _) in zip(self.both(entry), found, strict=True)
        ]
        if None in granted:
            assert granted == [None, None]
            return False
        self.tell(entry.requests[0], granted[0], first)
        self.hits += hit
        for request in entry.requests:
            request.num_computed_tokens += hit + count
            request.num_in_flight_tokens += count
        return True

    def tell(self, request: Request, granted: Any, first: bool) -> None:
        """What the scheduler sends to the workers: all ids of a request that begins, then the new ones."""
        if first:
            self.told[request.request_id] = self.managers[0].get_block_ids(request.request_id)
        else:
            for table, new in zip(self.told[request.request_id], granted.get_block_ids() or (), strict=True):
                table.extend(new)

    def admit(self) -> None:
        if self.waiting and len(self.running) < 6 and self.schedule(self.waiting[0], first=True):
            self.running.append(self.waiting.pop(0))

    def step(self) -> None:
        for m in self.managers:
            m.new_step_starts()
        for entry in list(self.running):
            while entry in self.running and self.wanted(entry) and not self.schedule(entry, first=False):
                self.preempt(self.running[-1])
        self.admit()
        land = self.random.random() < 0.8  # otherwise the step stays in flight
        for entry in list(self.running) if land else []:
            self.take(entry)

    def wanted(self, entry: Running) -> bool:
        return entry.requests[0].num_computed_tokens < entry.requests[0].num_tokens

    def take(self, entry: Running) -> None:
        token = self.tokens(1)
        for request in entry.requests:
            request.num_in_flight_tokens = 0
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(token)
        if entry.requests[0].num_tokens >= entry.length:
            self.free(entry)

    def free(self, entry: Running) -> None:
        for m, request in self.both(entry):
            m.free(request)
        self.running.remove(entry)

    def preempt(self, entry: Running) -> None:
        self.free(entry)
        for request in entry.requests:
            request.num_computed_tokens = request.num_in_flight_tokens = 0
        self.waiting.insert(0, entry)
        self.preempted += 1

    def play(self, steps: int) -> None:
        for _ in range(steps):
            if len(self.waiting) < 3:
                self.arrive()
            self.step()
            self.compare()

    def compare(self) -> None:
        one, other = (m.coordinator for m in self.managers)
        one.check()
        assert one.allocator.usage() == other.allocator.usage()
        assert one.allocator.counters() == other.allocator.counters()
        for mine, theirs in zip(one.single_type_managers, other.single_type_managers, strict=True):
            tables = [{r: [b.block_id for b in row] for r, row in m.req_to_blocks.items()} for m in (mine, theirs)]
            assert tables[0] == tables[1]
        for mine, theirs in zip(one.pools, other.pools, strict=True):
            assert [b.block_hash for b in mine.blocks] == [b.block_hash for b in theirs.blocks]
        assert one.hits == other.hits
        self.compare_tables(one)

    def compare_tables(self, coordinator: Any) -> None:
        """Workers know where every page is that a request holds, and no two pages overlap in the buffer."""
        config = coordinator.kv_cache_config
        held: dict[tuple[int, int], tuple[int, int]] = {}
        for entry in self.running:
            request_id = entry.requests[0].request_id
            tables = self.managers[0].get_block_ids(request_id)
            assert len(tables) == len(config.kv_cache_groups)
            for number, (group, table) in enumerate(zip(config.jenga_groups, tables, strict=True)):
                told = self.told[request_id][number]
                assert [page and told[i] for i, page in enumerate(table)] == table
                kinds = [coordinator.pools[group.index].blocks[p] for p in tables[group.index]]
                assert [block.is_null for block in kinds] == [page == 0 for page in table]
                for page in filter(None, table):
                    large, slot = divmod(page, group.place.ratio)
                    assert coordinator.allocator.owner(large) == group.index
                    assert held.setdefault((large, slot), (number, page)) == (number, page), "two pages in one place"


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
@pytest.mark.parametrize("name", MODELS)
def test_skipping_changes_nothing(name: str, caching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = preempted = hits = 0
    for seed in range(5):
        twins = Twins(name, monkeypatch, caching, seed)
        twins.play(steps=200)
        skipped += twins.steps[1] - twins.steps[0]
        preempted += twins.preempted
        hits += twins.hits
    assert skipped > 100
    assert preempted > 0
    assert (hits > 0) is caching


def test_parts_in_one_place_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told the first part's ids for every part, workers would write all into the same memory."""

    def first_only(self: Any, ids: list[list[int]]) -> tuple[list[int], ...]:
        return (*ids, *([*ids[group]] for group in self._wide for _ in range(PARTS["parts"][group] - 1)))

    monkeypatch.setattr(parts.PartIds, "__call__", first_only)
    with pytest.raises(AssertionError, match="two pages in one place"):
        Twins("parts", monkeypatch, caching=True, seed=0).play(steps=200)


def test_readers_of_events_are_told_of_types_only(monkeypatch: pytest.MonkeyPatch) -> None:
    managed = manager("parts", monkeypatch, caching=True, sparse=True)
    core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=managed, kv_cache_config=managed.kv_cache_config))
    told = EngineCore.get_kv_cache_group_metadata(core)
    assert [group["group_idx"] for group in told] == [0, 1, 2]
    assert [group["kind"] for group in told] == ["full_attention", "mamba", "sliding_window"]


@pytest.mark.parametrize("fault", ["slots", "cacheable", "droppable"])
def test_a_mark_too_far_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three marks, one page too high, is found by the comparison."""

    class Late(steady.Marks):
        def __setattr__(self, name: str, value: int) -> None:
            super().__setattr__(name, value + PAGE if name == fault and value else value)

    monkeypatch.setattr("jenga.vllm_plugin.coordinator.Marks", Late)
    twins = Twins("windows", monkeypatch, caching=True, seed=0)
    with pytest.raises((AssertionError, IndexError)):
        twins.play(steps=200)


def test_a_request_preempted_in_its_own_step_leaves_nothing_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """As priority scheduling does; pages in several parts have no parts any more by then."""
    made = manager("parts", monkeypatch, caching=False, sparse=True)
    hasher = get_request_block_hasher(PAGE, sha256)
    gone, stays = (
        Request(name, list(range(29)), SamplingParams(max_tokens=4), None, block_hasher=hasher) for name in "ab"
    )
    assert made.allocate_slots(gone, 29) is not None
    kept = made.allocate_slots(stays, 29)
    assert kept is not None
    made.free(gone)
    zeroed = made.coordinator.take_new_block_ids()
    offsets = made.kv_cache_config.id_offsets
    table = kept.get_block_ids()
    pages = {offset + page for offset, row in zip(offsets, table, strict=True) for page in row if page}
    assert zeroed
    assert set(zeroed) <= pages
