"""The memory snapshot: every byte of the buffer has exactly one cause."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jenga.allocator import GroupUsage, TwoLevelAllocator, Usage
from jenga.layout import GroupLayout, LayerGroup, Layout
from jenga.metrics import LiveUse, MemorySnapshot, memory_samples, memory_snapshot
from jenga.policies import FullAttention, RecurrentState, SlidingWindow

FULL = GroupLayout(LayerGroup("full", FullAttention(), 2, page_tokens=16, page_bytes=250), ratio=4, stride=256)
STATE = GroupLayout(LayerGroup("state", RecurrentState(), 6, page_tokens=16, page_bytes=1000), ratio=1, stride=1024)
LAYOUT = Layout(1024, (FULL, STATE), 0.0, 0.0, "by hand")


def test_hand_worked():
    # 10 large pages: 1 reserved, 4 free, 3 of `full` (7 live, 3 cached, 2 stranded), 2 of `state` (1 live, 1 cached).
    usage = Usage(10, 1, 4, 1, (GroupUsage(3, 7, 3, 2), GroupUsage(2, 1, 1, 0)))
    facts = [
        LiveUse(group=0, held=4, needed=3, empty_tokens=8),
        LiveUse(group=0, held=2, needed=2),
        LiveUse(group=1, held=1, needed=1, empty_tokens=9),  # a state has no empty places
    ]
    full, state = memory_snapshot(LAYOUT, usage, 10_300, facts).groups
    assert full.droppable_bytes == 250
    assert full.tail_bytes == 125
    assert full.needed_bytes == 6 * 250 - 125
    assert full.cached_bytes == 3 * 250
    assert full.padding_bytes == 10 * 6
    assert full.stranded_bytes == 2 * 256
    assert (state.needed_bytes, state.tail_bytes, state.padding_bytes) == (1000, 0, 48)
    snapshot = memory_snapshot(LAYOUT, usage, 10_300, facts)
    assert (snapshot.reserved_bytes, snapshot.free_bytes, snapshot.remainder_bytes) == (1024, 4096, 60)
    assert sum(snapshot.by_cause().values()) == 10_300


@st.composite
def pools(draw):
    """A layout of random strides and ratios, a pool in a random state, and true facts about part of it."""
    large = draw(st.sampled_from([720, 5040, 55440]))
    divisors = [r for r in range(1, 25) if large % r == 0]
    places, pool_ratios = [], []
    for index in range(draw(st.integers(1, 4))):
        ratio = draw(st.sampled_from(divisors))
        stride = large // ratio
        policy = draw(st.sampled_from([FullAttention(), SlidingWindow(40), RecurrentState()]))
        group = LayerGroup(f"g{index}", policy, 1, draw(st.integers(1, 33)), draw(st.integers(1, stride)))
        places.append(GroupLayout(group, ratio, stride))
        pool_ratios.append(ratio)
    pool = TwoLevelAllocator(draw(st.integers(2, 12)), pool_ratios, reserved=draw(st.integers(0, 1)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    held = [[] for _ in places]
    for _ in range(draw(st.integers(0, 60))):
        g = rng.randrange(len(places))
        if held[g] and rng.random() < 0.4:
            pool.release(g, held[g].pop(rng.randrange(len(held[g]))), keep=rng.random() < 0.5)
        else:
            want = [0] * len(places)
            want[g] = rng.randint(1, 2 * pool_ratios[g])
            if pool.fits(want):
                held[g] += pool.allocate(g, want[g])
    facts = []
    for g, pages in enumerate(held):
        told = rng.randint(0, len(pages))
        needed = rng.randint(0, told)
        facts.append(LiveUse(g, told, needed, rng.randint(0, needed * places[g].group.page_tokens)))
    layout = Layout(large, tuple(places), 0.0, 0.0, "random")
    return layout, pool, pool.large_pages * large + draw(st.integers(0, large - 1)), facts


@given(pools())
def test_parts_sum_exactly_to_the_buffer(case):
    layout, pool, buffer, facts = case
    snapshot = memory_snapshot(layout, pool.usage(), buffer, facts)
    causes = snapshot.by_cause()
    assert sum(causes.values()) == buffer
    assert min(causes.values()) >= 0
    for group in snapshot.groups:
        parts = [getattr(group, f"{c}_bytes") for c in ("needed", "tail", "droppable", "cached", "padding", "stranded")]
        assert sum(parts) == group.large_pages * layout.large_page_bytes
        assert min(parts) >= 0
    assert sum(g.large_pages for g in snapshot.groups) + snapshot.free_large_pages + pool.reserved == pool.large_pages


@given(pools())
def test_without_facts_everything_live_is_needed(case):
    layout, pool, buffer, _ = case
    causes = memory_snapshot(layout, pool.usage(), buffer).by_cause()
    assert (causes["tail"], causes["droppable"]) == (0, 0)
    assert sum(causes.values()) == buffer


@given(pools())
def test_samples_add_up_and_survive_json(case):
    layout, pool, buffer, facts = case
    snapshot = memory_snapshot(layout, pool.usage(), buffer, facts)
    assert MemorySnapshot.from_dict(json.loads(json.dumps(snapshot.to_dict()))) == snapshot
    out = list(memory_samples(snapshot))
    assert sum(s.value for s in out if s.metric.name == "jenga_memory_bytes") == buffer
    assert sum(s.value for s in out if s.metric.name == "jenga_large_pages") == pool.large_pages
    assert all(0 <= s.value <= 1 for s in out if s.metric.unit == "ratio")
    series = [(s.metric.name, tuple(s.labels.items())) for s in out]
    assert len(set(series)) == len(series)


def test_samples_name_group_and_state():
    usage = Usage(2, 1, 0, 0, (GroupUsage(1, 3, 0, 1), GroupUsage(0, 0, 0, 0)))
    out = {(s.metric.name, *s.labels.values()): s for s in memory_samples(memory_snapshot(LAYOUT, usage, 2048))}
    assert out["jenga_pages", "full", "live"].value == 3
    assert out["jenga_pages", "full", "live"].labels == {"group": "full", "state": "live"}
    assert out["jenga_memory_bytes", "(pool)", "reserved"].value == 1024
    assert out["jenga_memory_bytes", "full", "stranded"].value == 256
    assert out["jenga_fragmentation_ratio", "full"].value == 0.25
    assert out["jenga_fragmentation_ratio", "state"].value == 0


@pytest.mark.parametrize(
    ("usage", "buffer", "facts", "words"),
    [
        (Usage(1, 0, 1, 0, (GroupUsage(0, 0, 0, 0),)), 1024, [], "1 groups, the layout 2"),
        (Usage(2, 0, 2, 0, (GroupUsage(0, 0, 0, 0),) * 2), 2047, [], "exceed the buffer of 2047"),
        (
            Usage(2, 0, 1, 0, (GroupUsage(1, 2, 0, 2), GroupUsage(0, 0, 0, 0))),
            2048,
            [LiveUse(0, 3, 3)],
            "full.* 3 pages",
        ),
        (Usage(2, 0, 2, 0, (GroupUsage(0, 0, 0, 0),) * 2), 2048, [LiveUse(2, 0, 0)], "groups are 0 to 1"),
        (Usage(2, 0, 1, 0, (GroupUsage(1, 2, 0, 2), GroupUsage(0, 0, 0, 0))), 2048, [LiveUse(0, 1, 2)], "a part of"),
        (Usage(2, 0, 1, 0, (GroupUsage(1, 2, 0, 2), GroupUsage(0, 0, 0, 0))), 2048, [LiveUse(0, 1, 1, 17)], "17 empty"),
    ],
)
def test_contradictions_are_named(usage, buffer, facts, words):
    with pytest.raises(ValueError, match=words):
        memory_snapshot(LAYOUT, usage, buffer, facts)


def test_other_schema_versions_are_refused():
    snapshot = memory_snapshot(LAYOUT, Usage(2, 1, 1, 0, (GroupUsage(0, 0, 0, 0),) * 2), 2048)
    with pytest.raises(ValueError, match="schema version 99"):
        MemorySnapshot.from_dict(snapshot.to_dict() | {"schema_version": 99})
