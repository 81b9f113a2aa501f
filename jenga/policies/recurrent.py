"""Layers that fold the whole past into one state (Mamba-1/2, GDN, KDA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jenga.policies.base import CachedTest, LayerPolicy, register
from jenga.policies.pages import last_ending_cached


@register
@dataclass(frozen=True)
class RecurrentState(LayerPolicy):
    """One state per sequence; page ``i`` holds the state after ``(i + 1) * page_tokens`` tokens.

    A running sequence holds one state, whatever its length.  Cached pages are checkpoints: a prefix can be
    resumed only where one was kept.  Checkpoints are evicted tail first like every type's pages.
    """

    kind: ClassVar[str] = "recurrent_state"
    token_pages: ClassVar[bool] = False

    def resident_from(self, tokens: int, page_tokens: int) -> int:
        return max(0, tokens - 1) // page_tokens

    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        return pages == 0 or cached(pages - 1)

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        return last_ending_cached(cached, limit, stride)

    def pages_of_hit(self, pages: int, page_tokens: int) -> range:
        return range(max(0, pages - 1), pages)
