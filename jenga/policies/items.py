"""Layers that store whole items of a prompt: images, or any input that an encoder turns into many tokens.

Only tokens inside an item have entries, and an encoder makes all of them at once.  Where the items lie differs
from sequence to sequence: ``dataclasses.replace(policy, items=...)`` is the policy of one sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar

from jenga.policies.base import CachedTest, LayerPolicy, register

Item = tuple[int, int]
"""Half-open interval of token numbers."""


@dataclass(frozen=True)
class _Items(LayerPolicy):
    items: tuple[Item, ...] = ()
    """Where the items lie in the sequence, in order, without overlap."""

    def __post_init__(self) -> None:
        end = 0
        for start, stop in self.items:
            if not end <= start < stop:
                raise ValueError(f"item {start}..{stop} must begin at or after token {end} and end after its begin")
            end = stop

    def _item_ending_after(self, token: int) -> Item | None:
        index = bisect_right(self.items, token, key=itemgetter(1))
        return self.items[index] if index < len(self.items) else None

    def _item_around(self, token: int) -> Item | None:
        """The item that lies on both sides of the boundary before `token`."""
        item = self._item_ending_after(token)
        return item if item is not None and item[0] < token else None

    def holds(self, page: int, page_tokens: int) -> bool:
        item = self._item_ending_after(page * page_tokens)
        return item is not None and item[0] < (page + 1) * page_tokens


@register
@dataclass(frozen=True)
class CrossAttention(_Items):
    """Every token attends to all items before it (Llama 3.2 Vision, encoder-decoders).

    A hit needs the pages of all items before it and must not cut an item: its encoder would have to run again.
    """

    kind: ClassVar[str] = "cross_attention"

    def resident_from(self, tokens: int, page_tokens: int) -> int:
        return 0

    def pages_needed(self, tokens: int, page_tokens: int) -> int:
        count = end = 0  # pages below `end` are counted
        for start, stop in self.items:
            if start >= tokens:
                break
            after = -(-min(stop, tokens) // page_tokens)
            count += after - max(end, start // page_tokens)
            end = after
        return count

    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        return self._item_around(pages * page_tokens) is None and all(
            cached(i) for i in range(pages) if self.holds(i, page_tokens)
        )

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        pages = next((i for i in range(limit) if self.holds(i, page_tokens) and not cached(i)), limit)
        pages -= pages % stride
        while pages > 0 and (item := self._item_around(pages * page_tokens)) is not None:
            pages = item[0] // page_tokens
            pages -= pages % stride
        return pages


@register
@dataclass(frozen=True)
class VisionEmbedding(_Items):
    """Outputs of a vision encoder, kept only until the language model has read them.

    They can always be made again from the image, so they never shorten a hit; cached ones save the encoder's run.
    """

    kind: ClassVar[str] = "vision_embedding"

    def resident_from(self, tokens: int, page_tokens: int) -> int:
        return tokens // page_tokens

    def usable(self, pages: int, cached: CachedTest, page_tokens: int) -> bool:
        return True

    def longest_hit(self, limit: int, cached: CachedTest, page_tokens: int, stride: int = 1) -> int:
        return limit - limit % stride

    def pages_needed(self, tokens: int, page_tokens: int) -> int:
        """Pages of the item that token number `tokens` lies in, from that token on: it is encoded whole."""
        item = self._item_ending_after(tokens)
        if item is None or item[0] > tokens:
            return 0
        return -(-item[1] // page_tokens) - tokens // page_tokens
