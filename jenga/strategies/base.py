"""What a strategy decides: a `Plan`, the page geometry of one model in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm

from jenga.allocator import EvictCallback
from jenga.layers import Counts, LayerType, pages_held
from jenga.layout import TYPICAL_TOKENS, GroupLayout, LayerGroup, Layout
from jenga.strategies.pools import Partitions, Pool, Shape


class PlanError(Exception):
    """The model cannot be laid out in this memory; the message names the sizes and the remedy."""


@dataclass(frozen=True)
class Workload:
    """What a plan may be tuned for: lengths of typical sequences, image tokens in each (models with images), steps."""

    tokens: tuple[int, ...] = TYPICAL_TOKENS
    image_tokens: int = 0
    chunk_tokens: int = 8192
    """Tokens computed in one step: windows slide only between steps, so they must have room for so many."""


@dataclass(frozen=True)
class Share:
    """Layers of one type inside a group."""

    type: LayerType
    layers: int


@dataclass(frozen=True)
class SequenceBytes:
    """What a plan takes for one sequence; the parts sum to `total`.  Sums over sequences that share nothing."""

    needed: int
    tail: int
    """Token places of the needed pages that hold no token the layers need."""
    droppable: int
    """Kept although no layer will read it again (attention that forgets, treated as if it did not)."""
    padding: int

    @property
    def total(self) -> int:
        return self.needed + self.tail + self.droppable + self.padding


@dataclass(frozen=True)
class Plan:
    """Geometry of one model's KV memory under one strategy.  Immutable; `pool` makes the pool that follows it."""

    strategy: str
    model: str
    memory_bytes: int
    layout: Layout
    contents: tuple[tuple[Share, ...], ...]
    """Layers of every group; several types where a strategy does not tell them apart."""
    shape: Shape
    explanation: str
    free_unreachable: bool = False
    """Whether cached pages that no hit can get to are freed at once (`jenga.reach`)."""
    weighs_passes: bool = False
    """Whether a pause for a state's sake is weighed against what a forward pass costs (`Limits.pass_tokens`)."""
    refresh_waiting: bool = False
    """Whether what a request will find counts as used when it arrives, so that it is still there at its turn."""

    @property
    def groups(self) -> tuple[GroupLayout, ...]:
        """The groups, in the order in which pools number them."""
        return self.layout.groups

    @property
    def large_page_bytes(self) -> int:
        """Bytes of the unit in which the pool is handed out."""
        return self.layout.large_page_bytes

    @property
    def large_pages(self) -> int:
        """Units in the buffer, the reserved ones included."""
        return self.shape.units

    @property
    def counts(self) -> tuple[Counts, ...]:
        """Tokens that every group stores something for."""
        kinds = [{share.type.counts for share in held} for held in self.contents]
        return tuple(kind.pop() if len(kind) == 1 else Counts.ALL for kind in kinds)

    @property
    def hit_tokens(self) -> int:
        """Granularity of prefix hits, in tokens."""
        sizes = (g.group.page_tokens for g, c in zip(self.groups, self.counts, strict=True) if c is not Counts.IMAGES)
        return lcm(*sizes)

    def pool(self, on_evict: EvictCallback | None = None) -> Pool:
        """A pool of this geometry, with every page free."""
        return self.shape.build(on_evict)

    def pages(self, tokens: int, image_tokens: int = 0) -> list[int]:
        """Pages that a sequence of `tokens` text tokens and `image_tokens` image tokens holds in every group."""
        return [
            pages_held(place.group.policy, counts.length(tokens, image_tokens), place.group.page_tokens)
            for place, counts in zip(self.groups, self.counts, strict=True)
        ]

    def sequence(self, tokens: int, image_tokens: int = 0) -> SequenceBytes:
        """Bytes by cause that one such sequence takes."""
        needed = tail = droppable = padding = 0
        for place, held, count in zip(self.groups, self.contents, self.pages(tokens, image_tokens), strict=True):
            padding += count * place.padding
            for share in held:
                length = share.type.counts.length(tokens, image_tokens)
                size = place.group.page_tokens
                page = share.type.page_bytes(size) * share.layers
                used = min(count, pages_held(share.type.policy, length, size))
                exact = share.type.needed_bytes(length) * share.layers // share.type.layers
                needed += exact
                tail += used * page - exact
                droppable += (count - used) * page
        return SequenceBytes(needed, tail, droppable, padding)

    def capacity(self, tokens: int, image_tokens: int = 0) -> int:
        """Sequences of `tokens` tokens that an empty buffer holds at once."""
        pages = self.pages(tokens, image_tokens)
        low, high = 0, 1
        while self.shape.holds([n * high for n in pages]):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.shape.holds([n * middle for n in pages]) else (low, middle)
        return low

    def waste(self, sequences: int, tokens: int, image_tokens: int = 0) -> dict[str, int]:
        """Bytes of the whole buffer by cause when `sequences` such sequences are resident; they sum to `memory_bytes`.

        The causes are those of `jenga.metrics.memory`; what no sequence needs counts as free, the remainder included.
        """
        one = self.sequence(tokens, image_tokens)
        pages = [n * sequences for n in self.pages(tokens, image_tokens)]
        owned = sum(self.shape.owned(pages)) * self.large_page_bytes
        held = sum(n * place.stride for n, place in zip(pages, self.groups, strict=True))
        reserved = self.shape.reserved * self.large_page_bytes
        return {
            "needed": one.needed * sequences,
            "tail": one.tail * sequences,
            "droppable": one.droppable * sequences,
            "padding": one.padding * sequences,
            "stranded": owned - held,
            "reserved": reserved,
            "free": self.memory_bytes - owned - reserved,
        }


Strategy = Callable[[str, Sequence[LayerType], int, Workload], Plan]
"""``strategy(model name, layer types, memory in bytes, workload)``.

Raises:
    PlanError: the memory is too small; the message says how much is needed.
"""


def group_of(name: str, shares: Sequence[Share], page_tokens: int) -> LayerGroup:
    """A group of layers with the rules of its first share, and the bytes of all."""
    first = shares[0].type
    return LayerGroup(
        name=name,
        policy=first.policy,
        layers=sum(s.layers for s in shares),
        page_tokens=page_tokens,
        page_bytes=sum(s.type.page_bytes(page_tokens) * s.layers for s in shares),
        alignment=lcm(*(s.type.alignment for s in shares)),
    )


def require_pages(strategy: str, model: str, memory_bytes: int, unit_bytes: int, units: int, least: int) -> None:
    """Refuse a buffer of fewer than `least` units.

    Raises:
        PlanError: says how many bytes would do.
    """
    if units < least:
        raise PlanError(
            f"{model}, strategy {strategy}: {memory_bytes} bytes of KV memory hold {max(0, units)} pages of "
            f"{unit_bytes} bytes, and {least} are the least; give at least {least * unit_bytes} bytes, or a higher --tp"
        )


def partitioned_layout(groups: Sequence[LayerGroup], parts: Partitions, reason: str) -> Layout:
    """Presents fixed parts as a layout: the unit is the greatest common divisor of the pages, ratios are nominal."""
    return Layout(
        large_page_bytes=parts.unit_bytes,
        groups=tuple(GroupLayout(g, 1, s) for g, s in zip(groups, parts.strides, strict=True)),
        expected_padding=0.0,
        expected_stranded=0.0,
        reason=reason,
    )
