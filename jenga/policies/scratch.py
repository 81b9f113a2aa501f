"""Memory that a running sequence needs but that holds nothing of its past: draft tokens' states, small ring buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jenga.policies.base import CachedTest, LayerPolicy, register


@register
@dataclass(frozen=True)
class Scratch(LayerPolicy):
    """One page per running sequence, worthless once it ends: never cached, and never in the way of a hit."""

    kind: ClassVar[str] = "scratch"
    token_pages: ClassVar[bool] = False

    def resident_from(self, tokens: int, page_tokens: int) -> int:
        return 0

    def holds(self, page: int, page_tokens: int) -> bool:
        return page == 0

    def reusable(self, page: int, tokens: int, page_tokens: int) -> bool:
        return False

    def pages_needed(self, tokens: int, page_tokens: int) -> int:
        return min(1, tokens)

    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        return True

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        return limit - limit % stride

    def pages_of_hit(self, pages: int, page_tokens: int) -> range:
        return range(0)
