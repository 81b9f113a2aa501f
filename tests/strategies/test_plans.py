"""What must hold of every strategy's plan for every model of the zoo, and examples worked by hand."""

from __future__ import annotations

import pickle

import pytest

from jenga.allocator import PageState
from jenga.layers import LayerType
from jenga.metrics import memory_snapshot
from jenga.models import known_models, load_model
from jenga.policies import FullAttention, LatentAttention, LatentIndexer, RecurrentState, SlidingWindow
from jenga.strategies import STRATEGIES, Plan, PlanError, Workload, make_plan
from jenga.strategies.vllm import _approximate_divisor

MEMORY = 12 << 30
LENGTHS = (12, 300, 5000)


@pytest.fixture(scope="module", params=known_models())
def plans(request: pytest.FixtureRequest) -> dict[str, Plan]:
    model = load_model(request.param)
    types = model.layer_types()
    return {name: make_plan(name, model.name, types, MEMORY, Workload(LENGTHS)) for name in STRATEGIES}


def test_bytes_add_up(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        for place, shares in zip(plan.groups, plan.contents, strict=True):
            assert place.stride >= place.group.page_bytes > 0
            assert place.group.layers == sum(s.layers for s in shares)
            assert place.part_stride * place.ratio <= max(plan.large_page_bytes, place.part_stride)
            assert place.part_stride * place.parts == place.stride
        for tokens in LENGTHS:
            one = plan.sequence(tokens, 100)
            pages = plan.pages(tokens, 100)
            assert min(one.needed, one.tail, one.droppable, one.padding) >= 0
            assert one.total == sum(n * p.stride for n, p in zip(pages, plan.groups, strict=True))
            waste = plan.waste(plan.capacity(tokens), tokens)
            assert sum(waste.values()) == MEMORY
            assert min(waste.values()) >= 0
        assert pickle.loads(pickle.dumps(plan)) == plan


def test_every_strategy_needs_the_same(plans: dict[str, Plan]) -> None:
    """What a sequence needs is the model's, not the strategy's."""
    for tokens in LENGTHS:
        assert len({p.sequence(tokens, 100).needed for p in plans.values()}) == 1


def test_capacity_is_what_the_pool_grants(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        pool = plan.pool()
        pages = plan.pages(5000)
        count = plan.capacity(5000)
        assert pool.fits([n * count for n in pages])
        assert not pool.fits([n * (count + 1) for n in pages])
        held = [pool.allocate(g, n * count) for g, n in enumerate(pages)]
        usage = pool.usage()
        snapshot = memory_snapshot(plan.layout, usage, MEMORY)
        assert sum(snapshot.by_cause().values()) == MEMORY
        for group, granted in enumerate(held):
            assert len(set(granted)) == len(granted)
            assert all(pool.state(group, page) == PageState.LIVE for page in granted)
            for page in granted:
                pool.release(group, page, False)


def test_jenga_is_never_behind(plans: dict[str, Plan]) -> None:
    """At least as many sequences as vLLM, hits at least as fine, and padding within its bound."""
    mine, stock = plans["jenga"], plans["vllm"]
    for tokens in LENGTHS:
        assert mine.capacity(tokens) >= stock.capacity(tokens) * 0.995
        one = mine.sequence(tokens)
        assert one.padding <= 0.02 * one.total
        assert one.droppable == 0
    assert stock.hit_tokens % mine.hit_tokens == 0


def two_windows() -> list[LayerType]:
    return [
        LayerType("window", SlidingWindow(100), 2, cell_bytes=8, alignment=1),
        LayerType("full", FullAttention(), 3, cell_bytes=8, alignment=1),
    ]


def test_paged_keeps_what_windows_let_go() -> None:
    plan = make_plan("paged", "m", two_windows(), 100_000)
    assert plan.pages(1000) == [63]
    one = plan.sequence(1000)
    assert one.needed == 3 * 8 * 1000 + 2 * 8 * 99
    assert one.droppable == 2 * 8 * 16 * (63 - 7)  # the window's tokens 901 to 999 lie in 7 pages of 16
    assert one.total == 63 * 640


def test_max_fills_the_largest_page_with_tokens() -> None:
    plan = make_plan("max", "m", two_windows(), 100_000)
    window, full = plan.groups
    assert (full.group.page_tokens, full.stride, full.padding) == (16, 384, 0)
    assert (window.group.page_tokens, window.stride, window.padding) == (16, 384, 128)
    types = [*two_windows(), LayerType("state", RecurrentState(), 1, state_bytes=1000, alignment=1)]
    plan = make_plan("max", "m", types, 100_000)
    assert [g.group.page_tokens for g in plan.groups] == [48, 32, 48]
    assert [g.padding for g in plan.groups] == [1000 - 768, 1000 - 768, 0]


def test_the_papers_example() -> None:
    """256 and 384 bytes: LCM 768 holds three of one or two of the other; chunks of the GCD are 128."""
    types = [
        LayerType("window", SlidingWindow(100), 1, cell_bytes=16, alignment=1),
        LayerType("full", FullAttention(), 1, cell_bytes=24, alignment=1),
    ]
    exact = make_plan("jenga", "m", types, 100_000)
    assert exact.large_page_bytes == 768
    assert exact.layout.ratios == (3, 2)
    chunks = make_plan("gcd", "m", types, 100_000)
    assert chunks.large_page_bytes == 128
    assert [g.stride // 128 for g in chunks.groups] == [2, 3]


def test_static_is_tuned_for_the_workload() -> None:
    short = make_plan("static", "m", two_windows(), 1_000_000, Workload((64,)))
    long = make_plan("static", "m", two_windows(), 1_000_000, Workload((2000,)))
    assert short.capacity(64) > long.capacity(64)
    assert long.capacity(2000) > short.capacity(2000)
    # Equal needs at 64 tokens: two fifths of the bytes for the two window layers.
    owned = [g.large_pages * short.large_page_bytes for g in short.pool().usage().groups]
    assert owned[0] / sum(owned) == pytest.approx(0.4, abs=0.01)


def test_jenga_shares_tables_among_equal_rules() -> None:
    types = [
        LayerType("mla", LatentAttention(), 4, cell_bytes=100, block_tokens=64),
        LayerType("indexer", LatentIndexer(), 4, cell_bytes=132, cell_tokens=4, block_tokens=64),
        LayerType("window", SlidingWindow(100), 2, cell_bytes=8),
        LayerType("draft window", SlidingWindow(100), 1, cell_bytes=16),
        LayerType("other window", SlidingWindow(200), 1, cell_bytes=16),
    ]
    plan = make_plan("jenga", "m", types, 1 << 24)
    tables = {tuple(s.type.name for s in shares) for shares in plan.contents}
    assert tables == {("mla", "indexer"), ("window", "draft window"), ("other window",)}


def test_jenga_alone_frees_what_cannot_be_reached(plans: dict[str, Plan]) -> None:
    jenga = plans["jenga"]
    assert jenga.free_unreachable or jenga.layout.ratios == (1,), "with one page size tails are always the oldest"
    assert not any(plan.free_unreachable for name, plan in plans.items() if name != "jenga")


def test_plans_explain_themselves(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        assert "tokens" in plan.explanation or "bytes" in plan.explanation or "parts" in plan.explanation
    jenga = plans["jenga"]
    cut = any(place.parts > 1 for place in jenga.groups)
    assert ("parts, so that large pages stay small" in jenga.explanation) == cut


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_too_little_memory_is_refused_with_the_remedy(strategy: str) -> None:
    types = load_model("falcon-h1-34b").layer_types()
    with pytest.raises(PlanError, match=r"Falcon, strategy .*--tp"):
        make_plan(strategy, "Falcon", types, 1 << 20)


def test_bad_calls() -> None:
    with pytest.raises(PlanError, match=r"unknown strategy 'jnga'. Did you mean jenga\? Known: paged, max"):
        make_plan("jnga", "m", two_windows(), 1 << 20)
    with pytest.raises(PlanError, match="m has no layers"):
        make_plan("jenga", "m", [], 1 << 20)


def test_approximate_divisor_as_vllm() -> None:
    from vllm.v1.core.kv_cache_utils import _approximate_gcd

    for values in ([7], [11, 34, 5], [12, 18], [13, 13, 26], [5, 6, 7, 40], [3, 8]):
        for least in range(1, max(values) + 1):
            assert _approximate_divisor(values, least) == _approximate_gcd(values, lower_bound=least)
