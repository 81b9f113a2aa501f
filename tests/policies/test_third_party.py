"""A layer type from outside: the example of docs/memory.md, executed as it stands there."""

import re
from pathlib import Path

import pytest

from jenga import policies
from jenga.allocator import TwoLevelAllocator
from jenga.hits import GroupCache, longest_common_hit
from jenga.layout import LayerGroup, choose_layout
from jenga.metrics import memory_snapshot
from jenga.policies import FullAttention, base, policy_class

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"


@pytest.fixture
def block_local(monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 20, "the document promises 20 lines"
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # leave the registry as it was
    exec(compile(example, str(DOCUMENT), "exec"), {"__name__": "third_party"})
    return policy_class("block_local")


def test_the_documented_example(block_local):
    policy = block_local(block=8)
    # Pages of 4 tokens: token 16 begins the third block and sees from token 8 on.
    assert [policy.resident_from(t, 4) for t in (0, 15, 16, 23, 24)] == [0, 0, 2, 2, 4]
    assert policy.pages_needed(20, 4) == 3
    assert list(policy.pages_of_hit(5, 4)) == [2, 3, 4]
    assert policy.last_use(1, 24, 4) == 15
    assert policy.valid_hits(6, [False, False, True, True, False, False].__getitem__, 4) == {0, 4}
    assert policy.longest_hit(6, [False, False, True, True, False, False].__getitem__, 4) == 4


def test_it_works_with_all_the_rest(block_local):
    policy = block_local(block=8)
    groups = [LayerGroup("full", FullAttention(), 1, 4, 384), LayerGroup("local", policy, 1, 4, 256)]
    layout = choose_layout(groups, 1 << 20)
    assert layout.ratios == (2, 3)
    pool_size = layout.large_pages(1 << 20)
    pool = TwoLevelAllocator(pool_size, layout.ratios)
    needs = [g.policy.pages_needed(20, g.page_tokens) for g in groups]
    assert pool.fits(needs)
    for group, count in enumerate(needs):
        pool.allocate(group, count)
    snapshot = memory_snapshot(layout, pool.usage(), 1 << 20)
    assert [g.kind for g in snapshot.groups] == ["full_attention", "block_local"]
    assert sum(snapshot.by_cause().values()) == 1 << 20
    cached = [True, True, True, True, False].__getitem__
    hit = longest_common_hit([GroupCache(FullAttention(), 4, cached), GroupCache(policy, 4, cached)], 20)
    assert hit.tokens == 16


def test_the_document_lists_every_layer_type():
    text = DOCUMENT.read_text()
    for name in policies.__all__:
        kind = getattr(getattr(policies, name), "kind", None)
        if isinstance(kind, str):
            assert f"`{kind}`" in text, f"{kind} is missing from the document"
