"""The prefix hit rule: how many tokens of a prompt a model's caches let a request skip.

Stated once.  The engine calls it with what it has cached, the router with what it believes an engine has
cached, the simulator with its own caches; equal inputs give equal hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from jenga.policies import CachedTest, LayerPolicy


@dataclass(frozen=True)
class GroupCache:
    """One layer group's view of a prompt: its rules, page size, and which of the prompt's pages it has."""

    policy: LayerPolicy
    page_tokens: int
    cached: CachedTest


@dataclass(frozen=True)
class Hit:
    """Outcome of a lookup, in tokens."""

    tokens: int
    """Length that can be skipped."""
    furthest: int
    """Longest length that at least one group accepted: ``furthest - tokens`` tokens were computed before by
    some request, but another group cannot resume there (a missing checkpoint, an evicted window)."""
    limited_by: int | None
    """Index of the group that lowered the length last; None if only the prompt's own length ended it."""


def _nothing(_: int) -> bool:
    return False


def longest_common_hit(groups: Sequence[GroupCache], limit_tokens: int, alignment: int | None = None) -> Hit:
    """Longest prefix of at most `limit_tokens` tokens that every group can resume.

    `alignment` (tokens) is the granularity of hits; it must be a multiple of every page size and defaults to
    their least common multiple.  Each group either accepts the current length or lowers it to its own next
    valid one.  Every length passed over was refused by someone, so the loop ends at the largest length that
    is valid for all.  Put the groups with the tightest bound (full attention) first: fewer lookups.

    Raises:
        ValueError: `alignment` is not a multiple of some group's page size.
    """
    if not groups:
        return Hit(0, 0, None)
    align = alignment or lcm(*(g.page_tokens for g in groups))
    for group in groups:
        if align % group.page_tokens:
            raise ValueError(f"alignment {align} is not a multiple of the page size {group.page_tokens} tokens")
    length = limit_tokens - limit_tokens % align
    furthest = 0
    limited_by = None
    accepted = 0  # groups in a row that accepted `length`
    index = 0
    while length > 0 and accepted < len(groups):
        group = groups[index]
        size = group.page_tokens
        found = size * group.policy.longest_hit(length // size, group.cached, size, align // size)
        # Layer types that would accept with nothing cached (scratch memory, embeddings) prove nothing.
        if found > furthest and not group.policy.usable(found // size, _nothing, size):
            furthest = found
        if found < length:
            length, limited_by, accepted = found, index, 0
        accepted += 1
        index = (index + 1) % len(groups)
    return Hit(length, max(length, furthest), limited_by)
