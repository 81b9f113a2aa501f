"""Layers that keep a bounded number of tokens and drop the others by their content (PyramidKV, SnapKV, H2O)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jenga.policies.attention import FullAttention
from jenga.policies.base import CachedTest, register


@register
@dataclass(frozen=True)
class TokenBudget(FullAttention):
    """Full attention over at most `budget` kept tokens, packed into the sequence's first pages.

    What is kept depends on the sequence's own queries.  So a prefix can be resumed only while nothing of it was
    dropped, and the pages of a sequence that outgrew its budget are of no use to others.
    """

    budget: int
    kind: ClassVar[str] = "token_budget"

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, not {self.budget}")

    def holds(self, page: int, page_tokens: int) -> bool:
        return page * page_tokens < self.budget

    def reusable(self, page: int, tokens: int, page_tokens: int) -> bool:
        return tokens <= self.budget and super().reusable(page, tokens, page_tokens)

    def pages_needed(self, tokens: int, page_tokens: int) -> int:
        return super().pages_needed(min(tokens, self.budget), page_tokens)

    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        return pages * page_tokens <= self.budget and super().usable(pages, cached, page_tokens)

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        return super().longest_hit(min(limit, self.budget // page_tokens), cached, page_tokens, stride)
