"""Attention layers that keep one page per run of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import ClassVar

from jenga.policies.base import CachedTest, LayerPolicy, register
from jenga.policies.pages import first_missing, last_ending_cached, last_missing


@register
@dataclass(frozen=True)
class FullAttention(LayerPolicy):
    """Every token attends to all before it: nothing is droppable, a hit needs every page."""

    kind: ClassVar[str] = "full_attention"

    def resident_from(self, tokens: int, page_tokens: int) -> int:
        return 0

    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        return all(cached(i) for i in range(pages))

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        pages = first_missing(cached, limit)
        return pages - pages % stride


@register
@dataclass(frozen=True)
class LatentAttention(FullAttention):
    """MLA: one compressed latent per token, shared by all heads; the rules of full attention."""

    kind: ClassVar[str] = "mla"


@register
@dataclass(frozen=True)
class LatentIndexer(FullAttention):
    """Keys by which sparse MLA picks the tokens to attend to: the rules of full attention, pages of their own size."""

    kind: ClassVar[str] = "mla_indexer"


class _TrailingRun(LayerPolicy):
    """Shared by layer types where a hit of n pages needs the run of pages from some start up to n."""

    def _first_needed(self, pages: int, page_tokens: int) -> int:
        return min(pages, self.resident_from(pages * page_tokens, page_tokens))

    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        return all(cached(i) for i in range(self._first_needed(pages, page_tokens), pages))

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        # From the right: a miss at page i rules out every length whose run contains i, and since runs
        # start later for longer prefixes, those are all lengths above i up to the current candidate.
        pages = limit - limit % stride
        while pages > 0:
            missing = last_missing(cached, self._first_needed(pages, page_tokens), pages)
            if missing < 0:
                return pages
            # A length whose run is not empty needs its own last page: skip to where one is cached.
            pages = max(
                last_ending_cached(cached, missing, stride), self._longest_of_no_need(missing, page_tokens, stride)
            )
        return 0

    def _longest_of_no_need(self, limit: int, page_tokens: int, stride: int) -> int:
        """Longest length of at most `limit` pages, a multiple of `stride`, whose run is empty; 0 if there is none."""
        return limit - limit % stride


@register
@dataclass(frozen=True)
class SlidingWindow(_TrailingRun):
    """A token attends to the `window` last tokens, itself included."""

    window: int
    kind: ClassVar[str] = "sliding_window"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, not {self.window}")

    def resident_from(self, tokens: int, page_tokens: int) -> int:
        return max(0, tokens - self.window + 1) // page_tokens

    def _longest_of_no_need(self, limit: int, page_tokens: int, stride: int) -> int:
        return 0 if self.window > 1 else limit - limit % stride


@register
@dataclass(frozen=True)
class ChunkedLocal(_TrailingRun):
    """A token attends to the tokens of its own chunk of `chunk` tokens (Llama 4)."""

    chunk: int
    kind: ClassVar[str] = "chunked_local"

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, not {self.chunk}")

    def resident_from(self, tokens: int, page_tokens: int) -> int:
        return tokens // self.chunk * self.chunk // page_tokens

    def _longest_of_no_need(self, limit: int, page_tokens: int, stride: int) -> int:
        boundary = lcm(self.chunk, page_tokens * stride) // page_tokens
        return limit - limit % boundary
