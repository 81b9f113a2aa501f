"""What a layer type must say about its memory.

A policy answers five questions about one sequence, in *page indices of that sequence*: page ``i`` covers
tokens ``[i * page_tokens, (i + 1) * page_tokens)``.  It owns no memory and keeps no state, so the engine, the
simulator and the router can all ask the same object (JENGA, SOSP'25, section 4.3: the layer-type API).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

CachedTest = Callable[[int], bool]
"""Tells whether page ``i`` of a prefix is cached for the layer type that is asked."""


class LayerPolicy(ABC):
    """Memory rules of one layer type.  Instances are immutable; lengths are tokens unless named otherwise."""

    kind: ClassVar[str]
    """Name of the layer type, as configuration files, metrics and events spell it."""

    token_pages: ClassVar[bool] = True
    """Whether a page holds one entry per token (and so can be partly empty); False where it is one state."""

    @abstractmethod
    def resident_from(self, tokens: int, page_tokens: int) -> int:
        """First page index still needed to compute token number `tokens` (0-based).

        Pages before it, of a sequence with `tokens` computed tokens, can be dropped now.
        """

    @abstractmethod
    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        """Whether a prefix of exactly `pages` pages can be resumed from what is cached."""

    def holds(self, page: int, page_tokens: int) -> bool:
        """Whether the layer type ever stores anything for `page`; a page it does not hold takes no memory."""
        return True

    def reusable(self, page: int, tokens: int, page_tokens: int) -> bool:
        """Whether `page`, of a sequence with `tokens` computed tokens, can serve a hit once it is released."""
        return self.holds(page, page_tokens) and (page + 1) * page_tokens <= tokens

    def pages_needed(self, tokens: int, page_tokens: int) -> int:
        """Pages that a sequence of `tokens` tokens keeps resident."""
        return max(0, -(-tokens // page_tokens) - self.resident_from(tokens, page_tokens))

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        """Longest usable prefix, in pages, of at most `limit` pages and a multiple of `stride` pages.

        The valid lengths need not be an interval, so this is the largest member of `valid_hits`.
        Subclasses replace the scan by something faster, never by another answer.
        """
        for pages in range(limit - limit % stride, 0, -stride):
            if self.usable(pages, cached, page_tokens):
                return pages
        return 0

    def valid_hits(self, limit: int, cached: CachedTest, page_tokens: int) -> frozenset[int]:
        """Every usable prefix length in pages, 0 included (the paper's set of valid hit lengths)."""
        return frozenset(n for n in range(limit + 1) if n == 0 or self.usable(n, cached, page_tokens))

    def pages_of_hit(self, pages: int, page_tokens: int) -> range:
        """Page indices that a request must hold to resume after a hit of `pages` pages.

        Where `holds` says that a page takes no memory there is nothing to hold.
        """
        return range(min(pages, self.resident_from(pages * page_tokens, page_tokens)), pages)

    def last_use(self, page: int, tokens: int, page_tokens: int) -> int:
        """Last token number, of the `tokens` computed so far, whose computation read or wrote `page`.

        The eviction order compares these: a page that fell out of use earlier goes first.
        """
        start = page * page_tokens
        if start >= tokens:
            raise ValueError(f"page {page} starts at token {start}, but only {tokens} tokens are computed")
        low, high = start, tokens - 1
        while low < high:  # resident_from grows with the length, so the boundary can be bisected
            middle = (low + high + 1) // 2
            if self.resident_from(middle, page_tokens) <= page:
                low = middle
            else:
                high = middle - 1
        return low

    def eviction_rank(self, page: int) -> int:
        """Order among pages that fell out of use together: the smallest rank goes first.

        Tail first, the same for every layer type, so that what remains cached stays a common prefix
        (the paper's aligned eviction).
        """
        return -page


_REGISTRY: dict[str, type[LayerPolicy]] = {}


def register(policy: type[LayerPolicy]) -> type[LayerPolicy]:
    """Class decorator: make `policy` known by its `kind`.

    Raises:
        ValueError: another class already has this kind.
    """
    known = _REGISTRY.setdefault(policy.kind, policy)
    if known is not policy:
        raise ValueError(f"layer type {policy.kind!r} is already registered by {known.__qualname__}")
    return policy


def policy_class(kind: str) -> type[LayerPolicy]:
    """The policy registered for layer type `kind`.

    Raises:
        ValueError: nobody registered it; the message lists what is known.
    """
    try:
        return _REGISTRY[kind]
    except KeyError:
        raise ValueError(f"unknown layer type {kind!r}; known: {', '.join(sorted(_REGISTRY))}") from None
