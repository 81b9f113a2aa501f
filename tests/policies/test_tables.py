"""Hand-worked examples of every layer type's rules.  Pages hold 4 tokens; "x" is a cached page, "." a missing one."""

import pytest

from jenga.policies import (
    ChunkedLocal,
    CrossAttention,
    FullAttention,
    LatentAttention,
    LatentIndexer,
    LayerPolicy,
    RecurrentState,
    Scratch,
    SlidingWindow,
    TokenBudget,
    VisionEmbedding,
    policy_class,
    register,
)

PAGE = 4
IMAGES = ((2, 9), (17, 20))  # in pages 0 to 2, and in page 4

HITS = [
    (FullAttention(), "xxx.x", {0, 1, 2, 3}),
    (FullAttention(), ".xxxx", {0}),
    (LatentAttention(), "xx.", {0, 1, 2}),
    (LatentIndexer(), "xx.", {0, 1, 2}),
    # window 1: a token sees only itself, so nothing of the past is needed.
    (SlidingWindow(1), "....", {0, 1, 2, 3, 4}),
    # window 2..5: the token after a page boundary sees up to 1..4 tokens back: one page.
    (SlidingWindow(2), "x..x.", {0, 1, 4}),
    (SlidingWindow(5), "x..x.", {0, 1, 4}),
    # window 6: 5 tokens back: two pages, or all there are.
    (SlidingWindow(6), "x..xx", {0, 1, 5}),
    (SlidingWindow(6), ".xx.x", {0, 3}),
    # chunks of 8 tokens: at 8, 16, ... a new chunk begins and needs nothing.
    (ChunkedLocal(8), ".....", {0, 2, 4}),
    (ChunkedLocal(8), "x..x.", {0, 1, 2, 4}),
    # chunks of 6: 0..5, 6..11, 12..17; before token 8 lies page 1, before 16 page 3.
    (ChunkedLocal(6), ".x.x.", {0, 2, 3, 4}),
    (ChunkedLocal(6), "x....", {0, 1, 3}),
    # the state at exactly that length
    (RecurrentState(), ".x..x", {0, 2, 5}),
    # boundaries 4 and 8 cut the first image; 12 and 16 need pages 0 to 2; 20 also page 4.  Page 3 holds nothing.
    (CrossAttention(IMAGES), "xxx.x.", {0, 3, 4, 5, 6}),
    (CrossAttention(IMAGES), "xxx...", {0, 3, 4}),
    (CrossAttention(IMAGES), "x.xxxx", {0}),
    (CrossAttention(), "...", {0, 1, 2, 3}),
    # An image that begins and ends at page boundaries is cut by neither.
    (CrossAttention(((4, 12),)), ".xx.", {0, 1, 3, 4}),
    (CrossAttention(((6, 8),)), "....", {0, 1}),
    (Scratch(), "...", {0, 1, 2, 3}),
    (VisionEmbedding(IMAGES), "......", {0, 1, 2, 3, 4, 5, 6}),
    # 10 tokens: two whole pages; a third would have lost two of its prefix's tokens.
    (TokenBudget(10), "xxxxx", {0, 1, 2}),
    (TokenBudget(12), "xxxxx", {0, 1, 2, 3}),
    (TokenBudget(12), "x.xxx", {0, 1}),
]


@pytest.mark.parametrize(("policy", "cached", "valid"), HITS, ids=lambda v: str(v))
def test_hit_rule(policy, cached, valid):
    def test(page):
        return cached[page] == "x"

    assert policy.valid_hits(len(cached), test, PAGE) == valid
    for stride in range(1, len(cached) + 2):
        for limit in range(len(cached) + 1):
            expected = max(n for n in valid if n <= limit and n % stride == 0)
            assert policy.longest_hit(limit, test, PAGE, stride) == expected, (limit, stride)


RESIDENT = [
    # policy, {tokens computed: (first resident page, pages needed)}
    (FullAttention(), {0: (0, 0), 1: (0, 1), 4: (0, 1), 5: (0, 2), 16: (0, 4)}),
    (LatentAttention(), {9: (0, 3)}),
    (LatentIndexer(), {9: (0, 3)}),
    # token 8 sees 3..8, token 9 sees 4..9: page 0 goes.
    (SlidingWindow(6), {0: (0, 0), 8: (0, 2), 9: (1, 2), 12: (1, 2), 13: (2, 2)}),
    # token 7 is the last of page 1 and the only one it sees.
    (SlidingWindow(1), {7: (1, 1), 8: (2, 0)}),
    (ChunkedLocal(8), {7: (0, 2), 8: (2, 0), 9: (2, 1), 16: (4, 0), 23: (4, 2)}),
    (ChunkedLocal(6), {5: (0, 2), 6: (1, 1), 12: (3, 0), 18: (4, 1)}),
    # the state after 4 tokens is read by token 4 and lies in page 0; token 4 writes page 1.
    (RecurrentState(), {0: (0, 0), 1: (0, 1), 4: (0, 1), 5: (1, 1), 9: (2, 1)}),
    # pages 0..2 and 4 have image tokens, page 3 has none.
    (CrossAttention(IMAGES), {0: (0, 0), 2: (0, 0), 3: (0, 1), 9: (0, 3), 17: (0, 3), 18: (0, 4), 99: (0, 4)}),
    # two items in one page
    (CrossAttention(((0, 1), (2, 3), (3, 6))), {1: (0, 1), 3: (0, 1), 6: (0, 2), 50: (0, 2)}),
    # an image is encoded whole when its first token comes up, and read from there on.
    (
        VisionEmbedding(IMAGES),
        {0: (0, 0), 1: (0, 0), 2: (0, 3), 4: (1, 2), 8: (2, 1), 9: (2, 0), 17: (4, 1), 20: (5, 0)},
    ),
    (Scratch(), {0: (0, 0), 1: (0, 1), 99: (0, 1)}),
    (TokenBudget(10), {0: (0, 0), 1: (0, 1), 8: (0, 2), 9: (0, 3), 10: (0, 3), 99: (0, 3)}),
]


@pytest.mark.parametrize(("policy", "table"), RESIDENT, ids=lambda v: str(v)[:40])
def test_resident_pages(policy, table):
    found = {t: (policy.resident_from(t, PAGE), policy.pages_needed(t, PAGE)) for t in table}
    assert found == table


PAGES_OF_HIT = [
    (FullAttention(), {0: [], 3: [0, 1, 2]}),
    (LatentAttention(), {3: [0, 1, 2]}),
    (LatentIndexer(), {3: [0, 1, 2]}),
    (SlidingWindow(6), {0: [], 1: [0], 2: [0, 1], 4: [2, 3]}),
    (SlidingWindow(1), {4: []}),
    (ChunkedLocal(8), {1: [0], 2: [], 3: [2]}),
    (ChunkedLocal(6), {1: [0], 2: [1], 3: [], 4: [3]}),
    (RecurrentState(), {0: [], 1: [0], 4: [3]}),
    (CrossAttention(IMAGES), {3: [0, 1, 2], 4: [0, 1, 2], 6: [0, 1, 2, 4]}),
    (VisionEmbedding(IMAGES), {3: [], 6: []}),
    (Scratch(), {0: [], 3: []}),
    (TokenBudget(10), {2: [0, 1]}),
]


@pytest.mark.parametrize(("policy", "table"), PAGES_OF_HIT, ids=lambda v: str(v)[:40])
def test_pages_of_hit(policy, table):
    found = {n: [i for i in policy.pages_of_hit(n, PAGE) if policy.holds(i, PAGE)] for n in table}
    assert found == table


LAST_USE = [
    # policy, tokens computed, last token that touched pages 0, 1, 2, ...
    (FullAttention(), 10, [9, 9, 9]),
    (LatentAttention(), 10, [9, 9, 9]),
    (LatentIndexer(), 10, [9, 9, 9]),
    # page 0 ends with token 3, which token 8 is the last to see; page 1 ends with 7: token 12.
    (SlidingWindow(6), 20, [8, 12, 16, 19, 19]),
    (SlidingWindow(1), 10, [3, 7, 9]),
    (ChunkedLocal(8), 20, [7, 7, 15, 15, 19]),
    # chunks 0..5, 6..11, 12..17, 18..: page 1 (4..7) is in the first two, page 4 (16..19) in the last two.
    (ChunkedLocal(6), 20, [5, 11, 11, 17, 19]),
    # the state at the end of page 0 is read by token 4.
    (RecurrentState(), 10, [4, 8, 9]),
    (CrossAttention(IMAGES), 24, [23] * 6),
    (VisionEmbedding(IMAGES), 18, [3, 7, 11, 15, 17]),
    (Scratch(), 12, [11]),
    (TokenBudget(10), 12, [11, 11, 11]),
]


@pytest.mark.parametrize(("policy", "tokens", "uses"), LAST_USE, ids=lambda v: str(v)[:40])
def test_last_use(policy, tokens, uses):
    assert [policy.last_use(i, tokens, PAGE) for i in range(len(uses))] == uses


def test_last_use_of_a_page_not_reached():
    with pytest.raises(ValueError, match="page 3 starts at token 12, but only 12"):
        FullAttention().last_use(3, 12, PAGE)


def test_reusable_pages():
    assert [FullAttention().reusable(i, 11, PAGE) for i in range(3)] == [True, True, False]
    assert [CrossAttention(IMAGES).reusable(i, 24, PAGE) for i in range(6)] == [True, True, True, False, True, False]
    assert not Scratch().reusable(0, 24, PAGE)
    # Once a token has been dropped, what the pages hold depends on the sequence's own queries.
    assert [TokenBudget(10).reusable(i, 10, PAGE) for i in range(3)] == [True, True, False]
    assert [TokenBudget(10).reusable(i, 11, PAGE) for i in range(3)] == [False, False, False]


def test_tail_goes_first():
    assert sorted(range(4), key=FullAttention().eviction_rank) == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SlidingWindow(0), "window must be at least 1 token, not 0"),
        (lambda: ChunkedLocal(-1), "chunk must be at least 1 token, not -1"),
        (lambda: TokenBudget(0), "budget must be at least 1 token, not 0"),
        (lambda: CrossAttention(((3, 3),)), "item 3..3"),
        (lambda: VisionEmbedding(((3, 6), (5, 8))), "item 5..8 must begin at or after token 6"),
    ],
)
def test_bad_parameters(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_registry():
    kinds = ["full_attention", "mla", "mla_indexer", "sliding_window", "chunked_local", "recurrent_state"]
    for kind in [*kinds, "cross_attention", "vision_embedding", "token_budget", "scratch"]:
        assert policy_class(kind).kind == kind
    with pytest.raises(ValueError, match="unknown layer type 'fulll'; known: chunked_local, "):
        policy_class("fulll")

    class Impostor(LayerPolicy):
        kind = "mla"

    with pytest.raises(ValueError, match="'mla' is already registered by LatentAttention"):
        register(Impostor)
    assert policy_class("mla") is LatentAttention
