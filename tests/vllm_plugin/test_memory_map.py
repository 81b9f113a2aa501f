"""The memory map of a coordinator under load: every page's state, owners, position and last use, told anew from its
block tables and block objects."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from jenga.allocator import CLOCK_HZ, RESERVED, UNOWNED, PageState
from jenga.metrics.map import LargePage, MemoryMap
from jenga.vllm_plugin import memory_map
from tests.vllm_plugin.test_steady_steps import MODELS, Twins, installed

__all__ = ["installed"]  # a fixture


def compare(twins: Twins) -> dict[str, int]:
    """Hold the map against the books; how often each state was seen, and how many pages were shared."""
    manager = twins.managers[0]
    coordinator = manager.coordinator
    allocator = coordinator.allocator
    requests = {entry.requests[0].request_id: entry.requests[0] for entry in twins.running}
    core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=manager, requests=requests))
    told = memory_map.jenga_map(core)  # type: ignore[arg-type]
    assert told is not None
    taken = MemoryMap.from_dict(told)
    assert MemoryMap.decode(taken.encode("one")) == ("one", taken)
    for usage, counted in zip(allocator.usage().groups, taken.count(), strict=True):
        assert (usage.live, usage.cached, usage.stranded) == tuple(
            counted[state] for state in (PageState.LIVE, PageState.CACHED, PageState.FREE)
        )
    seen = {"live": 0, "cached": 0, "free": 0, "shared": 0, "partial": 0}
    held: list[dict[int, list[tuple[str, int]]]] = []
    for single in coordinator.single_type_managers:
        held.append({})
        for who, row in single.req_to_blocks.items():
            for index, block in enumerate(row):
                if not block.is_null:
                    held[-1].setdefault(block.block_id, []).append((who, index))
    for large, owner in enumerate(memoryview(taken.owners).cast("b")):
        found = memory_map.jenga_large_page(core, large)  # type: ignore[arg-type]
        assert found is not None
        assert found["large"] == large
        assert found["state"] == {RESERVED: "reserved", UNOWNED: "free"}.get(owner, "owned")
        if owner < 0:
            assert allocator.owner(large) is None
            continue
        group = taken.groups[owner]
        assert found["group"] == group.name == coordinator.kv_cache_config.layout.groups[owner].group.name
        assert len(found["pages"]) == group.ratio
        for page in found["pages"]:
            number, block = page["page"], coordinator.pools[owner].blocks[page["page"]]
            state = PageState(taken.states[owner][number])
            assert number // group.ratio == allocator.lead(large)
            assert page["state"] == state.name.lower() == allocator.state(owner, number).name.lower()
            assert (block.ref_cnt > 0) is (state is PageState.LIVE)
            holders = held[owner].get(number, [])
            assert sorted(page["owners"]) == sorted(who for who, _ in holders)
            seen[page["state"]] += 1
            seen["shared"] += len(holders) > 1
            if state is PageState.FREE:
                assert (page["begin"], page["end"], page["unused_s"]) == (None, None, None)
                continue
            if block.block_hash is not None:
                assert page["end"] == block.block_hash_num_tokens
            for who, index in holders:
                assert page["begin"] == index * group.page_tokens
                if block.block_hash is None:
                    stored = requests[who].num_computed_tokens
                    assert page["end"] == max(page["begin"], min(page["begin"] + group.page_tokens, stored))
                    seen["partial"] += page["end"] < page["begin"] + group.page_tokens
            if state is PageState.LIVE:
                assert page["unused_s"] == 0
            else:
                released = allocator.released(allocator.lead(large))[number] / CLOCK_HZ
                assert page["unused_s"] == pytest.approx(max(0, time.monotonic() - released), abs=5)
    return seen


def play(twins: Twins) -> Counter[str]:
    """Compare every few steps; the sums of what was seen."""
    seen: Counter[str] = Counter()
    for _ in range(15):
        twins.play(steps=8)
        seen.update(compare(twins))
    return seen


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
@pytest.mark.parametrize("name", MODELS)
def test_every_page_is_told_as_the_books_have_it(name: str, caching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    for seed in range(6):
        seen += play(Twins(name, monkeypatch, caching, seed))
    assert seen["live"] > 100
    assert seen["partial"] > 0
    assert (seen["cached"] > 0) is caching
    assert caching or not seen["shared"]


def test_nothing_is_told_of_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins("windows", monkeypatch, caching=True, seed=0)
    manager: Any = twins.managers[0]
    core: Any = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=manager, requests={}))
    assert memory_map.jenga_large_page(core, manager.coordinator.allocator.large_pages) is None
    assert memory_map.jenga_large_page(core, 0) == LargePage(0, "reserved", None, ()).to_dict() | {
        "pages": ({"page": 0, "state": "null", "owners": (), "begin": None, "end": None, "unused_s": None},)
    }
    stock: Any = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=object())))
    assert memory_map.jenga_map(stock) is None
    assert memory_map.jenga_large_page(stock, 1) is None


def test_a_wrong_owner_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a search that stops at the first request that holds a page."""
    original = memory_map._holders
    monkeypatch.setattr(memory_map, "_holders", lambda *asked: {p: h[:1] for p, h in original(*asked).items()})
    twins = Twins("windows", monkeypatch, caching=True, seed=2)
    with pytest.raises(AssertionError):
        play(twins)


class Untouched(list[KVCacheBlock]):
    """A table that nobody may look into."""

    def __len__(self) -> int:
        raise AssertionError("every holder was known already")


def test_a_look_passes_the_tables_once_and_stops_at_the_last_holder() -> None:
    """Hybrids have hundreds of pages in a large page: the cost must not be their number times the requests'."""
    blocks = [KVCacheBlock(number) for number in range(400)]
    for block in blocks[:364]:
        block.ref_cnt = 1
    one, other = blocks[:200], blocks[200:364]  # two requests' pages in one large page
    for row in (one, other):
        for index, block in enumerate(row):
            block.set_block_hash(b"", 16 * (index + 1))
    one[0].ref_cnt = 3  # a shared prefix, of a short request as well
    tables = {"stranger": blocks[364:400], "one": one, "empty": [], "short": [one[0]], "other": [one[0], *other[1:]]}
    other[0].ref_cnt = 0
    expected = {block.block_id: [("one", index)] for index, block in enumerate(one)}
    expected[0] += [("short", 0), ("other", 0)]
    expected |= {block.block_id: [("other", index)] for index, block in enumerate(other) if index}
    manager: Any = SimpleNamespace(req_to_blocks=tables | {"last": Untouched()}, block_size=16)
    pages = [block.block_id for block in blocks[:364] if block.ref_cnt]
    assert memory_map._holders(manager, SimpleNamespace(blocks=blocks), pages) == expected  # type: ignore[arg-type]
