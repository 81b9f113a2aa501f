"""How many groups a type's layers form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jenga.grouping import MAX_PARTS, choose_grouping, cut, part_cost
from jenga.layout import LayerGroup, LayoutError, choose_layout
from jenga.policies import FullAttention, RecurrentState, SlidingWindow

STATES = LayerGroup("states", RecurrentState(), 72, 16, 72 * 4_225_024, 16)
FULL = LayerGroup("full", FullAttention(), 72, 16, 72 * 16 * 2048, 16)


def test_parts_are_equal_and_complete() -> None:
    parts = cut(STATES, 9)
    assert [p.name for p in parts[:2]] == ["states 1/9", "states 2/9"]
    assert {(p.layers, p.page_bytes) for p in parts} == {(8, 8 * 4_225_024)}
    assert cut(FULL, 1) == [FULL]
    with pytest.raises(ValueError, match="72 layers do not form 5 equal groups"):
        cut(FULL, 5)


def test_large_states_are_cut_where_memory_is_small() -> None:
    small = choose_grouping([STATES, FULL], 2 << 30)
    large = choose_grouping([STATES, FULL], 400 << 30)
    assert small.parts[0] > large.parts[0]
    assert small.parts[1] == 1
    assert small.layout.large_page_bytes < STATES.page_bytes / 4
    # Without a cut one large page holds all 72 states: a seventh of the buffer.
    whole = choose_layout([STATES, FULL], 2 << 30)
    assert small.overhead < (whole.expected_padding + whole.expected_stranded) / 2


def test_a_group_more_must_pay() -> None:
    """No other grouping is better by the stated price."""
    chosen = choose_grouping([STATES, FULL], 8 << 30)
    part = part_cost([STATES, FULL])
    price = chosen.overhead + part * sum(chosen.parts)
    for parts in (1, 2, 3, 4, 6, 8, 9, 12):
        layout = choose_layout([*cut(STATES, parts), FULL], 8 << 30)
        assert price <= layout.expected_padding + layout.expected_stranded + part * (parts + 1) + 1e-12
    assert max(chosen.parts) <= MAX_PARTS


def test_a_part_costs_a_short_model_more_than_a_long_one() -> None:
    """The same page sizes: a step of 12 layers is soon over, and a block table more takes its time all the same."""
    few = [replace(t, layers=12) for t in (STATES, FULL)]
    assert part_cost(few) == pytest.approx(6 * part_cost([STATES, FULL]))
    assert sum(choose_grouping(few, 8 << 30).parts) < sum(choose_grouping([STATES, FULL], 8 << 30).parts)


def test_layers_that_belong_together_stay_together() -> None:
    assert choose_grouping([STATES, FULL], 2 << 30, divisible=[1, 1]).parts == (1, 1)
    assert choose_grouping([STATES, FULL], 2 << 30, divisible=[6, 1]).parts[0] in (1, 2, 3, 6)


def test_nothing_to_group() -> None:
    with pytest.raises(LayoutError, match="at least one layer group"):
        choose_grouping([], 1 << 30)


def test_ratios_are_made_rounder_where_their_multiple_would_be_huge() -> None:
    """Pages of 77 MB, 206 KB, 176 KB and 160 KB: exact, a large page would hold 371 GB."""
    sizes = {"states": 77_152_256, "latents": 211_376, "ring": 180_224, "window": 163_840}
    groups = [LayerGroup(name, FullAttention(), 1, 16, size, 16) for name, size in sizes.items()]
    layout = choose_layout(groups, 40 << 30)
    assert layout.large_page_bytes < 2 * 77_152_256
    assert all(g.padding <= 0.02 * g.stride for g in layout.groups)
    assert all(g.ratio * g.stride == layout.large_page_bytes for g in layout.groups)


def test_windows_get_large_pages_of_their_own() -> None:
    """Gemma-3-27B: 52 layers slide, 10 do not.  Several windows in one large page would strand free slots."""
    window = LayerGroup("window", SlidingWindow(1024), 52, 16, 52 * 131_072, 16)
    full = LayerGroup("full", FullAttention(), 10, 16, 10 * 131_072, 16)
    chosen = choose_grouping([window, full], 40 << 30).layout
    assert {place.ratio for place in chosen.groups if "window" in place.group.name} == {1}
    assert chosen.expected_padding == 0
    assert chosen.expected_stranded < 0.01


def test_memory_too_small_for_any_grouping() -> None:
    with pytest.raises(LayoutError, match="do not hold one large page"):
        choose_grouping([STATES, FULL], 1 << 20)
