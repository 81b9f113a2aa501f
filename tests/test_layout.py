"""Page geometry: strides tile the large page exactly, padding stays bounded, the choice is the cheapest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jenga.layout import (
    MAX_PADDING,
    STRANDING,
    TYPICAL_TOKENS,
    GroupLayout,
    LayerGroup,
    Layout,
    LayoutError,
    choose_layout,
    exact_layout,
    padded_layouts,
)
from jenga.policies import CrossAttention, FullAttention, RecurrentState, SlidingWindow

MEMORY = 8 << 30


def group(name, page_bytes, policy=None, page_tokens=16, alignment=1):
    return LayerGroup(name, policy or FullAttention(), 1, page_tokens, page_bytes, alignment)


@st.composite
def group_lists(draw):
    alignment = draw(st.sampled_from([1, 16, 256]))
    policies = [FullAttention(), SlidingWindow(1024), RecurrentState(), CrossAttention(), CrossAttention(((0, 900),))]
    return [
        group(f"g{i}", size, draw(st.sampled_from(policies)), draw(st.sampled_from([1, 16, 32])), alignment)
        for i, size in enumerate(draw(st.lists(st.integers(1, 60_000), min_size=1, max_size=4)))
    ]


def cost(layout):
    return layout.expected_padding + layout.expected_stranded


def assert_tiles(layout, groups):
    assert [g.group for g in layout.groups] == list(groups)
    for place in layout.groups:
        assert place.stride * place.ratio == layout.large_page_bytes
        assert place.stride >= place.group.page_bytes
        assert place.stride % place.group.alignment == 0
        assert place.padding == place.stride - place.group.page_bytes
    assert 0 <= layout.expected_padding < 1
    assert 0 <= layout.expected_stranded <= 1.0
    assert layout.reason


@given(group_lists(), st.sampled_from([1 << 20, MEMORY, 1 << 40]))
def test_chosen_layout(groups, memory):
    try:
        layout = choose_layout(groups, memory)
    except LayoutError:
        assert all(large > memory for large, _ in padded_layouts(groups))
        return
    assert_tiles(layout, groups)
    exact = exact_layout(groups, memory)
    assert 0 < layout.large_pages(memory) * layout.large_page_bytes <= memory
    if exact.large_pages(memory) > len(groups):
        assert layout.large_pages(memory) > len(groups)
        assert cost(layout) <= cost(exact)
    if layout != exact:
        assert all(g.padding <= MAX_PADDING * g.stride for g in layout.groups)


@given(group_lists())
def test_exact_layout_pads_to_the_alignment_only(groups):
    layout = exact_layout(groups, MEMORY)
    assert_tiles(layout, groups)
    assert all(g.padding < g.group.alignment for g in layout.groups)


@given(group_lists())
def test_padded_candidates(groups):
    for large, ratios in padded_layouts(groups):
        for g, ratio in zip(groups, ratios, strict=True):
            assert large % (ratio * g.alignment) == 0
            stride = large // ratio
            assert 0 <= stride - g.page_bytes <= MAX_PADDING * stride


def test_the_paper_s_example():
    layout = exact_layout([group("a", 256), group("b", 384)], MEMORY)
    assert layout.large_page_bytes == 768
    assert layout.ratios == (3, 2)
    assert layout.expected_padding == 0
    assert choose_layout([group("a", 256), group("b", 384)], MEMORY).ratios == (3, 2)


def test_a_little_padding_buys_a_small_ratio():
    # A hybrid's 16 KiB attention page and 265 KiB state: exactly 16 states to 265 pages.
    groups = [group("attention", 16 << 10), group("state", 265 << 10, RecurrentState())]
    exact = exact_layout(groups, MEMORY)
    assert exact.ratios == (265, 16)
    candidates = list(padded_layouts(groups))
    assert (265 << 10, [16, 1]) in candidates  # attention pages padded by 3.4 %
    assert (272 << 10, [17, 1]) in candidates  # states padded by 2.6 %
    layout = choose_layout(groups, 64 << 20)  # where a few large pages of 4.2 MiB would be a large part
    assert layout.large_page_bytes < exact.large_page_bytes / 4


def test_one_group_needs_no_second_level():
    layout = choose_layout([group("all", 4096)], MEMORY)
    assert (layout.large_page_bytes, layout.ratios, layout.expected_padding) == (4096, (1,), 0)


def test_expected_padding_by_hand():
    # One group, 1000 of 1024 bytes used at every length.
    layout = choose_layout([group("g", 1000, alignment=1024)], MEMORY)
    assert layout.expected_padding == pytest.approx(24 / 1024)


def test_padding_counts_at_its_worst_length():
    # A state of 58,000 bytes in the place of 64,000: most of a sequence of 512 tokens, little of a long one.
    groups = [group("full", 1000, alignment=1000), group("state", 58_000, RecurrentState(), alignment=64_000)]
    layout = exact_layout(groups, MEMORY)
    assert layout.ratios == (64, 1)
    assert min(TYPICAL_TOKENS) == 512
    assert layout.expected_padding == pytest.approx(6_000 / (64_000 + 32 * 1000))


def test_windows_that_slide_cost_free_slots():
    """A window page of its own size in the large page strands nothing; several in one do."""
    window = group("window", 5000, SlidingWindow(1024))
    full = group("full", 1000)
    alone = choose_layout([window, full], 1 << 40)  # ratio 1 for windows, 5 for full attention
    assert alone.ratios == (1, 5)
    assert alone.expected_stranded < 0.001
    shared = exact_layout([group("window", 5000, SlidingWindow(1024)), group("full", 6000)], 1 << 40)
    assert shared.ratios == (6, 5)
    assert 0.002 < shared.expected_stranded < STRANDING


def test_a_large_page_must_fit():
    groups = [group("attention", 16 << 10), group("state", 265 << 10, RecurrentState())]
    # Exact pages of 4.2 MiB fit once or twice, and would leave a group without one.
    layout = choose_layout(groups, 6 << 20)
    assert layout.large_pages(6 << 20) > len(groups)
    with pytest.raises(LayoutError, match=r"300000 bytes .* attention, state takes .* give at least"):
        choose_layout([group("attention", 16 << 10), group("state", 400 << 10, RecurrentState())], 300_000)


def test_bytes_needed():
    places = (
        GroupLayout(group("full", 256), ratio=4, stride=256),
        GroupLayout(group("window", 512, SlidingWindow(32)), ratio=2, stride=512),
    )
    layout = Layout(1024, places, 0.0, 0.0, "by hand")
    assert layout.bytes_needed(0) == 0
    assert layout.bytes_needed(1) == 2 * 1024
    # 160 tokens: 10 full pages in 3 large pages; token 160 sees 129..160: 2 pages in 1 large page.
    assert layout.bytes_needed(160) == 4 * 1024
    assert layout.large_pages(10_000) == 9


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "at least one layer group"),
        ([group("kv", 0)], "group kv: page_bytes is 0"),
        ([group("kv", 8), group("x", 8, page_tokens=0)], "group x: page_tokens is 0"),
        ([group("kv", 8, alignment=0)], "group kv: alignment is 0"),
    ],
)
def test_errors(groups, words):
    with pytest.raises(LayoutError, match=words):
        choose_layout(groups, MEMORY)
