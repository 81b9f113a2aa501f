"""What must hold for every layer type and for every mix of them: the fast rules equal brute force."""

from dataclasses import replace
from math import lcm

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jenga.hits import GroupCache, Hit, longest_common_hit
from jenga.policies import (
    ChunkedLocal,
    CrossAttention,
    FullAttention,
    LatentAttention,
    LatentIndexer,
    RecurrentState,
    Scratch,
    SlidingWindow,
    TokenBudget,
    VisionEmbedding,
)
from jenga.policies.pages import PageBits

sizes = st.integers(1, 70)


@st.composite
def item_spans(draw):
    spans, end = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), max_size=4)):
        spans.append((end + gap, end + gap + length))
        end = spans[-1][1]
    return tuple(spans)


policies = st.one_of(
    st.just(FullAttention()),
    st.just(LatentAttention()),
    st.just(LatentIndexer()),
    st.just(RecurrentState()),
    st.just(Scratch()),
    st.builds(SlidingWindow, sizes),
    st.builds(ChunkedLocal, sizes),
    st.builds(CrossAttention, item_spans()),
    st.builds(VisionEmbedding, item_spans()),
    st.builds(TokenBudget, sizes),
)

bits = st.lists(st.booleans(), max_size=24)


def page_bits(cached):
    return PageBits(sum(1 << i for i, is_cached in enumerate(cached) if is_cached))


@given(policies, st.integers(1, 9), bits, st.integers(1, 6))
def test_longest_hit_is_the_largest_valid_one(policy, page_tokens, cached, stride):
    valid = policy.valid_hits(len(cached), cached.__getitem__, page_tokens)
    assert valid == {n for n in range(len(cached) + 1) if n == 0 or policy.usable(n, cached.__getitem__, page_tokens)}
    for limit in range(len(cached) + 1):
        expected = max(n for n in valid if n <= limit and n % stride == 0)
        assert policy.longest_hit(limit, cached.__getitem__, page_tokens, stride) == expected
        assert policy.longest_hit(limit, page_bits(cached), page_tokens, stride) == expected


@given(policies, st.integers(1, 9), bits)
def test_a_hit_never_misses_a_page_it_must_hold(policy, page_tokens, cached):
    for n in policy.valid_hits(len(cached), cached.__getitem__, page_tokens):
        pages = policy.pages_of_hit(n, page_tokens)
        assert not pages or pages.stop == n
        assert all(cached[i] for i in pages if policy.holds(i, page_tokens))


@given(policies, st.integers(1, 9), st.integers(1, 120))
def test_dropping_is_final(policy, page_tokens, tokens):
    starts = [policy.resident_from(t, page_tokens) for t in range(tokens + 1)]
    assert starts == sorted(starts)  # a page that was droppable never comes back
    assert all(start <= t // page_tokens for t, start in enumerate(starts))  # the page being written stays
    for page in range(-(-tokens // page_tokens)):
        used = [t for t in range(page * page_tokens, tokens) if starts[t] <= page]
        assert policy.last_use(page, tokens, page_tokens) == max(used)


@given(policies, st.integers(1, 9), st.integers(0, 120))
def test_pages_needed_are_held_and_resident(policy, page_tokens, tokens):
    needed = policy.pages_needed(tokens, page_tokens)
    start = policy.resident_from(tokens, page_tokens)
    if isinstance(policy, VisionEmbedding):  # the rest of the item at hand, which runs ahead of the tokens computed
        ahead = next((stop for begin, stop in policy.items if begin <= tokens < stop), tokens)
        assert needed == (0 if ahead == tokens else -(-ahead // page_tokens) - start)
    elif isinstance(policy, CrossAttention):
        stored = {t // page_tokens for begin, stop in policy.items for t in range(begin, min(stop, tokens))}
        assert needed == len(stored)
        assert all(policy.holds(i, page_tokens) for i in stored)
    else:
        pages = range(start, -(-tokens // page_tokens))
        assert needed == sum(policy.holds(i, page_tokens) for i in pages)


@st.composite
def mixes(draw):
    """Groups of random types and page sizes with random caches, a prompt's limit, and an alignment or None."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=4))
    limit = draw(st.integers(0, 80))
    density = draw(st.sampled_from([0.5, 0.9, 0.97]))
    groups, caches = [], []
    random = draw(st.randoms(use_true_random=False))
    for size in sizes:
        cached = [random.random() < density for _ in range(limit // size)]
        caches.append(cached)
        groups.append(GroupCache(draw(policies), size, cached.__getitem__))
    multiple = draw(st.sampled_from([None, 1, 2]))
    return groups, limit, multiple and multiple * lcm(*sizes)


@settings(max_examples=400)
@given(mixes())
def test_common_hit_is_the_largest_length_valid_for_all(case):
    groups, limit, alignment = case
    align = alignment or lcm(*(g.page_tokens for g in groups))
    valid = set(range(0, limit + 1, align))
    for g in groups:
        pages = g.policy.valid_hits(limit // g.page_tokens, g.cached, g.page_tokens)
        valid &= {n * g.page_tokens for n in pages}
    hit = longest_common_hit(groups, limit, alignment)
    as_bits = [replace(g, cached=page_bits([g.cached(i) for i in range(limit // g.page_tokens)])) for g in groups]
    assert longest_common_hit(as_bits, limit, alignment) == hit
    assert hit.tokens == max(valid)
    assert hit.tokens <= hit.furthest <= limit
    assert (hit.limited_by is None) == (hit.tokens == limit - limit % align)


def test_common_hit_names_who_limits_it():
    full = GroupCache(FullAttention(), 4, ([True] * 6).__getitem__)
    state = GroupCache(RecurrentState(), 8, [False, True, False].__getitem__)
    assert longest_common_hit([full, state], 27) == Hit(tokens=16, furthest=24, limited_by=1)
    assert longest_common_hit([full, state], 19) == Hit(tokens=16, furthest=16, limited_by=None)
    assert longest_common_hit([], 19) == Hit(0, 0, None)


def test_a_group_is_asked_again_when_another_lowered_the_length():
    first = GroupCache(RecurrentState(), 4, [True, False, True].__getitem__)
    second = GroupCache(RecurrentState(), 4, [True, True, False].__getitem__)
    assert longest_common_hit([first, second], 12) == Hit(tokens=4, furthest=12, limited_by=0)


def test_alignment_must_suit_every_page_size():
    groups = [GroupCache(FullAttention(), 4, [].__getitem__), GroupCache(FullAttention(), 6, [].__getitem__)]
    with pytest.raises(ValueError, match="alignment 8 is not a multiple of the page size 6"):
        longest_common_hit(groups, 0, 8)
