"""Working memory of running sequences."""

from __future__ import annotations

from jenga.hits import GroupCache, longest_common_hit
from jenga.policies import FullAttention, Scratch, policy_class


def test_one_page_whatever_the_length() -> None:
    policy = Scratch()
    assert [policy.pages_needed(n, 16) for n in (0, 1, 16, 17, 10_000)] == [0, 1, 1, 1, 1]
    assert [page for page in range(100) if policy.holds(page, 16)] == [0]
    assert policy.resident_from(10_000, 16) == 0
    assert policy_class("scratch") is Scratch


def test_never_cached_and_never_in_the_way() -> None:
    policy = Scratch()
    assert not policy.reusable(0, 10_000, 16)
    assert list(policy.pages_of_hit(5, 16)) == []
    assert policy.valid_hits(6, lambda _: False, 16) == frozenset(range(7))
    assert policy.longest_hit(7, lambda _: False, 16, stride=2) == 6
    full = GroupCache(FullAttention(), 16, lambda page: page < 3)
    scratch = GroupCache(policy, 16, lambda _: False)
    for groups in ([full, scratch], [scratch, full]):
        hit = longest_common_hit(groups, 100)
        assert hit.tokens == 48
        assert hit.furthest == 48, "memory that is never cached cannot tell what was computed before"
