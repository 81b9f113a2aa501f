"""What one kind of layer stores, in bytes: the input of every page geometry.

A `LayerType` is already resolved: tensor parallelism and the cache's data type are in its byte counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from jenga.policies import CrossAttention, LayerPolicy, VisionEmbedding


class Counts(Enum):
    """Which tokens of a sequence a layer type stores something for."""

    TEXT = "text"
    IMAGES = "images"
    ALL = "all"

    def length(self, tokens: int, image_tokens: int) -> int:
        """Tokens stored, of a sequence with `tokens` text tokens and `image_tokens` image tokens."""
        if self is Counts.ALL:
            return tokens + image_tokens
        return tokens if self is Counts.TEXT else image_tokens


@dataclass(frozen=True)
class LayerType:
    """Layers of a model that store the same bytes for the same tokens, on one tensor-parallel rank.

    A layer stores either `cell_bytes` for every `cell_tokens` tokens, or `copies` states of `state_bytes` per sequence.
    """

    name: str
    policy: LayerPolicy
    layers: int
    cell_bytes: int = 0
    cell_tokens: int = 1
    state_bytes: int = 0
    copies: int = 1
    block_tokens: int = 16
    """A page's tokens must be a multiple of this (the smallest block that the kernels take)."""
    max_block_tokens: int | None = None
    """Largest block that the kernels take, if there is one."""
    alignment: int = 16
    """Bytes that must divide the distance between pages."""
    counts: Counts = Counts.TEXT
    shape: tuple[int, ...] = ()
    """Heads and their sizes, for engines that group only layers of equal shape."""

    @property
    def is_state(self) -> bool:
        """The same memory for every sequence, whatever its length."""
        return self.state_bytes > 0

    def page_bytes(self, page_tokens: int) -> int:
        """Bytes of one layer's page of `page_tokens` tokens, without padding.

        Raises:
            ValueError: `page_tokens` is not a multiple of the cell.
        """
        if self.is_state:
            return self.state_bytes * self.copies
        if page_tokens % self.cell_tokens:
            raise ValueError(
                f"{self.name}: pages of {page_tokens} tokens do not hold whole cells of {self.cell_tokens}"
            )
        return page_tokens // self.cell_tokens * self.cell_bytes

    def needed_bytes(self, tokens: int, page_tokens: int | None = None) -> int:
        """Bytes that all its layers need when it stores `tokens` tokens, in pages of `page_tokens` (default: cells).

        This is the least any memory manager can give: nothing padded, nothing kept that could be dropped.
        """
        size = page_tokens or self.cell_tokens
        return pages_held(self.policy, tokens, size) * self.page_bytes(size) * self.layers


def pages_held(policy: LayerPolicy, tokens: int, page_tokens: int) -> int:
    """Pages that `policy` keeps of `tokens` tokens; those of an image layer are all image tokens."""
    if isinstance(policy, CrossAttention | VisionEmbedding) and not policy.items and tokens:
        policy = replace(policy, items=((0, tokens),))
    return policy.pages_needed(tokens, page_tokens)
